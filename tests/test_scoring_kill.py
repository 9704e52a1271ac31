"""Killed at any instant by a real signal, or stopped by Ctrl-C, a run goes on and ends as one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import random_adapters
from harness_tasks import write_tasks
from lm_eval.loggers import EvaluationTracker

from lm_eval_lora_ensemble import saving
from lm_eval_lora_ensemble.errors import EnsembleError

HARNESS = Path(__file__).with_name("scoring_kill_harness.py")


def runs(output: Path) -> list[tuple[dict, dict[str, list[dict]]]]:
    """Return each run saved below ``output``: its results, and its samples by task."""
    found = []
    for file in sorted(output.rglob("results_*.json")):
        date = file.stem.removeprefix("results_")
        results = json.loads(file.read_text())
        samples = {
            task: [json.loads(line) for line in file.with_name(f"samples_{task}_{date}.jsonl").open()]
            for task in results["configs"]
        }
        found.append((results, samples))
    return found


def assert_same_run(one, other) -> None:
    (results, samples), (expected, expected_samples) = one, other
    assert results["config"]["lora_ensemble"] == expected["config"]["lora_ensemble"]
    assert results["results"].keys() == expected["results"].keys()
    for task, row in expected["results"].items():
        assert results["results"][task].keys() == row.keys()
        for metric, value in row.items():
            if isinstance(value, float):
                assert results["results"][task][metric] == pytest.approx(value, abs=1e-5), (task, metric)
    assert samples.keys() == expected_samples.keys()
    for task, rows in expected_samples.items():
        assert [s["doc_id"] for s in samples[task]] == [s["doc_id"] for s in rows]
        assert [s["prompt_hash"] for s in samples[task]] == [s["prompt_hash"] for s in rows]
        for mine, theirs in zip(samples[task], rows, strict=True):
            np.testing.assert_allclose(mine["members"], theirs["members"], atol=1e-4)


@pytest.mark.parametrize(
    "kills", [pytest.param(8, id="8-kills"), pytest.param(64, id="64-kills", marks=pytest.mark.long)]
)
def test_sigkill_at_any_instant_loses_nothing(llama, tmp_path, kills):
    random_adapters(llama, tmp_path / "adapters", 2)
    write_tasks(tmp_path / "tasks")
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(tmp_path), str(kills), "1"],
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({**report, "deaths": Counter(death["phase"] for death in report["deaths"])}))
    assert [death["signal"] for death in report["deaths"]] == [signal.SIGKILL] * kills
    phases = Counter(death["phase"] for death in report["deaths"])
    assert phases == {"any": kills / 2, **dict.fromkeys(("score", "store", "write", "move"), kills / 8)}
    assert (report["lost"], report["changed"], report["torn"]) == ([], [], [])
    (reference,) = runs(tmp_path / "reference" / "out")
    n_scores = max(death["stored"] for death in report["deaths"])
    assert any(0 < death["stored"] < n_scores for death in report["deaths"])
    for chain in tmp_path.glob("chain_???"):
        saved = runs(chain / "out")
        assert saved
        for run in saved:
            assert_same_run(run, reference)
        assert not [path for path in (chain / "out").rglob(".*finished")]


def evaluation(llama: Path, folder: Path, *extra: str) -> list[str]:
    if not (folder / "adapters").is_dir():
        random_adapters(llama, folder / "adapters", 2)
        write_tasks(folder / "tasks")
    return [
        *(sys.executable, "-m", "lm_eval_lora_ensemble", "run", "--model", "lora-ensemble"),
        *("--model_args", f"adapters={folder / 'adapters'}", "--device", "cpu", "--tasks", "both"),
        *("--include_path", str(folder / "tasks"), *extra),
    ]


# Sitecustomize of the child: each pack takes a moment, as those of a large model do.
SLOW = """
import atexit, sys, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "lm_eval_lora_ensemble.scoring.packed":
            sys.meta_path.remove(self)
            from lm_eval_lora_ensemble import backend
"""


def test_a_repeated_run_is_equal_to_the_last_bit(llama, tmp_path):
    for name in ("one", "two"):
        command = evaluation(llama, tmp_path, "--log_samples", "--output_path", str(tmp_path / name))
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    ((one, samples),), ((two, again),) = runs(tmp_path / "one"), runs(tmp_path / "two")
    assert one["results"] == two["results"]
    assert samples == again
    assert any(sample["members"] for sample in samples["plain_a"])
