"""Killed at any instant by a real signal, or stopped by Ctrl-C, a run goes on and ends as one that was not."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import n_stored, random_adapters
from harness_tasks import write_tasks
from sqlitedict import SqliteDict

from lm_eval_lora_ensemble import errors
from lm_eval_lora_ensemble.harness.cache import saved_scores
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM

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
    made, expected_made = (dict(each["config"]["lora_ensemble"]) for each in (results, expected))
    # how this process scored: one that had all from the cache did not
    made.pop("engine"), expected_made.pop("engine")
    assert made == expected_made
    assert results["results"].keys() == expected["results"].keys()
    for task, row in expected["results"].items():
        assert results["results"][task].keys() == row.keys()
        for metric, value in row.items():
            if isinstance(value, float):
                assert results["results"][task][metric] == pytest.approx(value, abs=1e-5, nan_ok=True), (
                    task,
                    metric,
                )
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
    assert (report["lost"], report["changed"], report["torn"]) == ([], [], [])
    phases = Counter(death["phase"] for death in report["deaths"])
    assert phases == {"any": kills / 2, **dict.fromkeys(("score", "store", "write", "move"), kills / 8)}
    (reference,) = runs(tmp_path / "reference" / "out")
    n_scores = max(death["stored"] for death in report["deaths"])
    assert any(0 < death["stored"] < n_scores for death in report["deaths"])
    for chain in tmp_path.glob("chain_???"):
        saved = runs(chain / "out")
        assert saved
        for run in saved:
            assert_same_run(run, reference)
        assert len(list((chain / "out").rglob("samples_*"))) == 2 * len(saved)
        assert not list((chain / "out").rglob(".*finished"))


def test_ctrl_c_stops_at_once_and_says_what_is_saved(ensemble, tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    command = [
        *(sys.executable, "-m", "lm_eval_lora_ensemble", "run", "--model", "lora-ensemble"),
        *("--model_args", f"adapters={ensemble}", "--device", "cpu", "--batch_size", "1", "--tasks", "both"),
        *("--include_path", str(write_tasks(tmp_path / "tasks", n_rows=1500)), "--use_cache", str(cache)),
        *("--output_path", str(tmp_path / "out")),
    ]
    with log.open("w") as stderr:
        child = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while n_stored(Path(f"{cache}_rank0.db")) < 100 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    start = time.monotonic()
    status = child.wait(timeout=60)
    assert time.monotonic() - start < 10
    assert status == -signal.SIGINT  # which a shell calls 130
    said = re.findall(r"stopped; (\d+) scored requests are saved in (\S+); the same command", log.read_text())
    saved = n_stored(Path(f"{cache}_rank0.db")) - 1
    assert said == [(str(saved), f"{cache}_rank0.db")]
    assert 100 <= saved < 4000
    assert log.read_text().rstrip().splitlines()[-1].startswith("lora-ensemble: stopped; ")
    assert "Traceback" not in log.read_text()
    assert not runs(tmp_path / "out")


def test_ctrl_c_without_a_cache_says_what_would_have_helped(ensemble, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(errors, "_is_command", lambda: True)
    LoraEnsembleLM(adapters=str(ensemble), device="cpu")
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "nothing was saved; with --use_cache PATH, a run goes on where it was" in capsys.readouterr().err


def test_ctrl_c_inside_the_cache_is_answered_too(tmp_path):
    """The state that a Ctrl-C between the two halves of ``Condition.notify`` leaves: the next wake-up is lost."""
    cache = SqliteDict(str(tmp_path / "cache.db"), autocommit=True)
    for key in ("owner", "one", "two"):
        cache[key] = key
    assert len(cache) == 3
    stale = threading.Lock()
    stale.acquire()
    time.sleep(0.2)  # the store's thread waits again
    cache.conn.reqs.not_empty._waiters.appendleft(stale)
    start = time.monotonic()
    assert saved_scores(cache).startswith("2 scored requests are saved in ")
    assert 2 < time.monotonic() - start < 8  # nobody answered
    cache.close()
