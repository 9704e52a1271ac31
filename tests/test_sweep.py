"""Every epoch evaluated with one loaded base model is what a run of its own gives; a sweep goes on where it was."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import n_stored, random_adapters
from harness_tasks import write_tasks
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from two_processes import in_two_processes

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.ensemble import manifest
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.sweep.plan import parse_epochs


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """Two members with two kept epochs, as training leaves them."""
    folder = tmp_path_factory.mktemp("sweep") / "ensemble"
    random_adapters(llama, folder, 2)
    for epoch, spread in ((1, 0.1), (2, 0.5)):
        random_adapters(llama, folder / f"epoch_{epoch}", 2, spread=spread)
    entries = []
    for m in range(2):
        name = f"member_{m:02d}"
        for epoch in (1, 2):
            shutil.move(folder / f"epoch_{epoch}" / name, folder / name / f"epoch_{epoch:02d}")
        entries.append(manifest.MemberEntry(name, name, m, {e: f"{name}/epoch_{e:02d}" for e in (1, 2)}))
    for epoch in (1, 2):
        shutil.rmtree(folder / f"epoch_{epoch}")
    manifest.Manifest(str(llama), None, entries).write(folder)
    return folder


def sweep(trained, tasks, output, *extra):
    words = ["sweep", str(trained), "--tasks", "plain_a", "--ood", "plain_b", "--output", str(output)]
    return cli.main([*words, "--include_path", str(tasks), *extra])


def members_of(samples):
    return [np.array(sample["members"]) for sample in samples]


def test_each_epoch_is_what_its_own_run_gives_and_done_ones_are_skipped(trained, tasks, tmp_path, capsys):
    assert sweep(trained, tasks, tmp_path / "out") == 0
    assert "report" in capsys.readouterr().out
    assert not (tmp_path / "out" / ".in_progress").exists()
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    both = {"tasks": ["plain_a", "plain_b"], "task_manager": manager, "bootstrap_iters": 0}
    for epoch in (0, 1, 2):
        folder = tmp_path / "out" / f"epoch_{epoch:02d}"
        (run,) = load_runs(folder)
        assert run.config["lora_ensemble"]["epoch"] == epoch
        assert run.config["model_args"]["epoch"] == epoch
        assert run.n_members == (1 if epoch == 0 else 2)
        alone = LoraEnsembleLM(adapters=str(trained), epoch=epoch, device="cpu", batch_size="auto")
        expected = simple_evaluate(model=alone, **both)
        (file,) = folder.rglob("samples_plain_a_*.jsonl")
        saved = [json.loads(line) for line in file.open()]
        for mine, theirs in zip(members_of(saved), members_of(expected["samples"]["plain_a"]), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    (tmp_path / "out" / "epoch_01").rename(tmp_path / "kept")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "epoch_02").rglob("*")}
    assert sweep(trained, tasks, tmp_path / "out") == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    again, before = (
        [json.loads(line)["members"] for f in sorted(place.rglob("samples_*.jsonl")) for line in f.open()]
        for place in (tmp_path / "out" / "epoch_01", tmp_path / "kept")
    )
    assert again == before


def test_another_sweep_is_refused(trained, tasks, tmp_path, capsys):
    output = tmp_path / "out"
    assert sweep(trained, tasks, output, "--epochs", "0", "--limit", "2") == 0
    assert sweep(trained, tasks, output, "--epochs", "0", "--limit", "3") == 2
    assert "other limit" in capsys.readouterr().err
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").touch()
    assert sweep(trained, tasks, tmp_path / "busy", "--epochs", "0") == 2
    assert "holds other files" in capsys.readouterr().err


@pytest.mark.long  # test_harness_tasks has two processes in the default suite
def test_two_processes_sweep_as_one_does(trained, tasks, tmp_path):
    """Both score, the first one writes, and neither removes what the other still needs."""
    words = ["-m", "lm_eval_lora_ensemble.cli", "sweep", str(trained), "--epochs", "1,2"]
    words += ["--tasks", "plain_a", "--ood", "plain_b"]
    done = in_two_processes(*words, "--include_path", str(tasks), "--output", str(tmp_path / "two"))
    assert done.stdout.count("epoch 1:") == 1
    assert done.stdout.count("To see them") == 1
    assert sweep(trained, tasks, tmp_path / "one", "--epochs", "1,2") == 0
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"sweep.json", "epoch_01", "epoch_02"}
    for epoch in (1, 2):
        (one,), (two,) = (load_runs(tmp_path / place / f"epoch_{epoch:02d}") for place in ("one", "two"))
        for task in ("plain_a", "plain_b"):
            np.testing.assert_allclose(
                two.tasks[task].log_probabilities, one.tasks[task].log_probabilities, atol=1e-4
            )


def asked(progress: str) -> int:
    """Return how many requests the bar of scoring counted to."""
    return int(re.findall(r"× 2 members:.*/(\d+) \[", progress)[-1])


def test_ctrl_c_says_that_the_same_command_goes_on_and_it_does(trained, tmp_path):
    tasks = write_tasks(tmp_path / "many", n_rows=300)
    words = ["sweep", str(trained), "--tasks", "plain_a", "--epochs", "1", "--include_path", str(tasks)]
    words += ["--batch_size", "1", "--device", "cpu", "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "lm_eval_lora_ensemble.cli", *words]
    cache = tmp_path / "out" / ".in_progress" / "epoch_01" / "scores_rank0.db"
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        deadline = time.monotonic() + 200
        while n_stored(cache) < 50 and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    last = said.rstrip().splitlines()[-1]
    assert last.endswith(f"are kept in {tmp_path / 'out'}; the same command goes on from there")
    assert "Traceback" not in said
    kept = n_stored(cache)
    assert kept >= 50
    again = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    # one row of the cache names its owner
    assert asked(again.stderr) == asked(said) - (kept - 1)
    assert (tmp_path / "out" / "epoch_01").is_dir()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--epochs", "3"], "no epoch 3"),
        (["--epochs", "2..1"], "give epochs as"),
        (["--epochs", "x"], "give epochs as"),
        (["--epochs", "0..1000000000"], "none above 100,000"),
        (["--limit", "0"], "--limit 0: give a number above 0"),
        (["--ood", "plain_a"], "both in --tasks and in --ood"),
        (["--tasks", "nonsense", "--epochs", "0"], "no task nonsense"),
    ],
)
def test_what_cannot_be_swept_is_named(trained, tasks, tmp_path, capsys, extra, message):
    assert sweep(trained, tasks, tmp_path / "out", *extra) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # or the corrected command would be refused as another sweep


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(trained, tasks, tmp_path):
    with pytest.raises(AttributeError, match="float33"):
        sweep(trained, tasks, tmp_path / "out", "--epochs", "0", "--model_args", "dtype=float33")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path, tasks, capsys):
    assert sweep(tmp_path / "nowhere", tasks, tmp_path / "out") == 2
    assert "no ensemble folder" in capsys.readouterr().err


def test_a_file_is_no_output(trained, tasks, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert sweep(trained, tasks, tmp_path / "out", "--epochs", "0") == 2
    assert "out is a file; name a folder" in capsys.readouterr().err


def test_epochs_are_read():
    assert parse_epochs("0..2") == [0, 1, 2]
    assert parse_epochs("4,0,2..3") == [0, 2, 3, 4]


def test_another_base_model_is_refused(trained, mistral, tmp_path):
    from lm_eval_lora_ensemble.ensemble.members import find_ensemble

    model = LoraEnsembleLM(adapters=str(trained), epoch=0, device="cpu")
    other = find_ensemble(random_adapters(mistral, tmp_path / "other", 1))
    with pytest.raises(EnsembleError, match="another base model"):
        model.change_members(other)
