"""Killed at any instant by a real signal, a run goes on and ends with the files of one that was not."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train_run import contents
from train_fixtures import make_recipe, one_thread, quick_tasks  # noqa: F401

from lm_eval_lora_ensemble.train.run import train_members

HARNESS = Path(__file__).with_name("train_kill_harness.py")


VARIATIONAL = {"ivon": {"optimizer": "ivon", "learning_rate": 0.03}, "blob": {"posterior": "blob"}}


@pytest.mark.parametrize(
    ("kills", "method"),
    [
        pytest.param(8, "ivon", id="8-kills"),
        pytest.param(32, "point", id="32-kills", marks=pytest.mark.long),
        pytest.param(16, "blob", id="16-kills-blob", marks=pytest.mark.long),
    ],
)
def test_sigkill_at_any_instant_changes_nothing(tmp_path, kills, method):
    setting = {"epochs": 3, "dropout": 0.1, "checkpoint_steps": 2, "members": 2, "keep_snapshots": 4}
    setting |= VARIATIONAL.get(method, {})
    start = time.monotonic()
    reference = train_members(make_recipe(tmp_path, output=str(tmp_path / "reference"), **setting))
    seconds = time.monotonic() - start
    recipe = make_recipe(tmp_path, output=str(tmp_path / "killed"), **setting)
    (tmp_path / "recipe.yaml").write_text(recipe.as_yaml())
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(tmp_path / "recipe.yaml"), str(kills), "1", str(seconds)],
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    log = tmp_path / "killed.log"
    assert [death["signal"] for death in report["deaths"]] == [signal.SIGKILL] * kills
    assert report["last_exit"] == 0, log.read_text()[-3000:]
    assert contents(tmp_path / "killed") == contents(reference)
    assert "Traceback" not in log.read_text()
    assert "damaged" not in log.read_text()
