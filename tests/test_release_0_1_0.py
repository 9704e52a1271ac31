"""What 0.1.0 wrote is read with the same numbers; ``tests/data/release_0_1_0`` was made by its code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM

RELEASE = Path(__file__).parent / "data" / "release_0_1_0"
WHERE_IT_WAS = "/models/tasks"
TASKS = ["both", "varies_context", "several_golds"]


@pytest.fixture
def release(tmp_path, monkeypatch) -> Path:
    folder = Path(shutil.copytree(RELEASE, tmp_path / "release"))
    for task in (folder / "tasks").glob("*.yaml"):
        task.write_text(task.read_text().replace(WHERE_IT_WAS, str(folder / "tasks")))
    monkeypatch.chdir(folder)
    return folder


def results_file(folder: Path) -> dict:
    (file,) = (folder / "results" / "ensemble").glob("results_*.json")
    return json.loads(file.read_text())


def evaluate(folder: Path, **options: object) -> dict:
    model = LoraEnsembleLM(pretrained="base", adapters="ensemble", dtype="float32", device="cpu")
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    return simple_evaluate(model=model, tasks=TASKS, task_manager=manager, bootstrap_iters=0, **options)


def test_its_ensemble_folder_is_sound_and_gives_its_numbers(release, capsys):
    assert cli.main(["check", "ensemble"]) == 0
    assert "2 members on" in capsys.readouterr().out
    then, now = results_file(release), evaluate(release)
    assert now["config"]["lora_ensemble"]["members"] == [
        {**member, "folder": str(release / "ensemble" / member["name"])}
        for member in then["config"]["lora_ensemble"]["members"]
    ]
    for task, values in then["results"].items():
        for key, value in values.items():
            if isinstance(value, float) and "stderr" not in key:
                assert now["results"][task][key] == pytest.approx(value, abs=1e-5), (task, key)


def test_its_kept_epochs_still_load(release):
    first, last = (
        LoraEnsembleLM(pretrained="base", adapters="ensemble", epoch=epoch, device="cpu") for epoch in (1, 2)
    )
    assert first.ensemble.fingerprint != last.ensemble.fingerprint


def test_its_cache_is_read_and_nothing_is_scored_again(release, monkeypatch):
    scored = []
    monkeypatch.setattr(
        LoraEnsembleLM, "_scores", lambda self, requests, _: scored.append(requests) or iter(())
    )
    now, then = evaluate(release, use_cache="scores"), results_file(release)
    assert not any(scored)
    for task, values in then["results"].items():
        for key, value in values.items():
            if isinstance(value, float) and "stderr" not in key:
                assert now["results"][task][key] == pytest.approx(value, abs=1e-12), (task, key)


def test_its_samples_carry_every_members_scores(release):
    (run,) = load_runs(release / "results")
    assert run.n_members == 2 and {"plain_a", "plain_b", "varies_context"} <= set(run.tasks)
