"""Results and samples of a run appear all together or not at all."""

from __future__ import annotations

import copy
import json
import resource
from pathlib import Path

import pytest
from lm_eval.loggers import EvaluationTracker

from lm_eval_lora_ensemble.disk import FINISHED, UNFINISHED
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness import saving

ROW = {
    "doc_id": 0,
    "doc_hash": "a",
    "prompt_hash": "b",
    "target_hash": "c",
    "target": 1,
    "arguments": [("x", "y")],
    "resps": [[(-1.5, True)]],
    "filtered_resps": [(-1.5, True)],
}
SAMPLES = {"one": [ROW] * 3, "two": []}
RESULTS = {"config": {"lora_ensemble": {}}, "configs": {"one": {}, "two": {}}}


@pytest.fixture(autouse=True)
def _installed() -> None:
    saving.save_runs_whole()


def save(output: Path, results: dict = RESULTS, samples: dict | None = SAMPLES) -> None:
    """Save as lm-eval's command line does, which hands over samples that it then changes."""
    samples = samples and {task: [copy.deepcopy(row) for row in rows] for task, rows in samples.items()}
    tracker = EvaluationTracker(output_path=str(output))
    tracker.general_config_tracker.model_name_sanitized = "model"
    tracker.save_results_aggregated(results=dict(results), samples=samples)
    for task in samples or {}:
        tracker.save_results_samples(task_name=task, samples=samples[task])


def names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix().split("_20")[0] for path in folder.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize(
    ("adapters", "folder"),
    [
        ("./my/ensemble", "my__ensemble"),
        ("org/a;org/b", "org__a;org__b"),
        (["a", "b"], "a;b"),
        (None, "ensemble"),
        ("x" * 300, f"{'x' * 111}_01234567"),
    ],
)
def test_the_folder_has_the_adapters_name(tmp_path, adapters, folder):
    arguments = {"pretrained": "base", **({"adapters": adapters} if adapters else {})}
    config = {"lora_ensemble": {"fingerprint": "0123456789"}, "model_args": arguments}
    save(tmp_path / "out", {**RESULTS, "config": config})
    assert names(tmp_path / "out") == [
        *(".saving.lock", f"{folder}/results", f"{folder}/samples_one", f"{folder}/samples_two")
    ]
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["model_name_sanitized"] == folder


def test_files_are_lm_evals_own(tmp_path):
    save(tmp_path / "ours")
    save(tmp_path / "theirs", {**RESULTS, "config": {}})
    expected = ["model/results", "model/samples_one", "model/samples_two"]
    assert names(tmp_path / "ours") == [".saving.lock", *expected]
    assert names(tmp_path / "theirs") == expected
    ours, theirs = (next((tmp_path / name).rglob("samples_one*")).read_text() for name in ("ours", "theirs"))
    assert ours == theirs and ours.count("\n") == 3


def test_samples_are_saved_once_and_only_when_asked_for(tmp_path):
    save(tmp_path, samples=None)
    save(tmp_path)
    assert names(tmp_path).count("model/samples_one") == 1
    assert names(tmp_path).count("model/results") == 2


def test_an_output_path_may_name_the_file(tmp_path):
    save(tmp_path / "sub" / "mine.json")
    assert names(tmp_path / "sub") == [".saving.lock", "mine", "samples_one", "samples_two"]


def test_a_full_disk_leaves_nothing_and_is_an_error(tmp_path):
    """The kernel refuses to let a file grow, as it does on a full disk; lm-eval alone makes that a warning."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    long = {"one": SAMPLES["one"] * 1000, "two": []}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            EnsembleError, match=r"results could not be written to .* nothing of them was kept"
        ):
            save(tmp_path, samples=long)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == [".saving.lock"]


def test_what_a_killed_run_left_is_put_right(tmp_path):
    for folder, file in ((UNFINISHED, "results_half.json"), (FINISHED, "results_whole.json")):
        (tmp_path / folder / "model").mkdir(parents=True)
        (tmp_path / folder / "model" / file).write_text("{}")
    save(tmp_path)
    assert (tmp_path / "model" / "results_whole.json").read_text() == "{}"
    assert names(tmp_path).count("model/results") == 1
    assert not list(tmp_path.rglob("*half*"))
    assert json.loads(next((tmp_path / "model").glob("results_20*")).read_text())["configs"]
