"""Whole runs: the folder that comes out, going on after a stop, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from train_fixtures import make_recipe, make_task, one_thread, quick, quick_tasks  # noqa: F401
from transformers import AutoModelForCausalLM
from two_processes import in_two_processes

from lm_eval_lora_ensemble import cli, disk
from lm_eval_lora_ensemble.disk import sha256
from lm_eval_lora_ensemble.ensemble.manifest import Manifest
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train.joint import JointEngine
from lm_eval_lora_ensemble.train.plain import PlainEngine
from lm_eval_lora_ensemble.train.run import train_members


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """A finished ensemble: two members, three epochs of six steps, dropout on."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        return train_members(make_recipe(folder, output=str(folder / "trained"), **SETTING))


SETTING = {"epochs": 3, "dropout": 0.1, "lora_l2": 0.01, "checkpoint_steps": 2}


def contents(path: Path) -> dict[str, str]:
    """Every file's checksum, the file that names the output folder aside."""
    return {
        str(file.relative_to(path)): sha256(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file != path / "recipe.yaml"
    }


def test_the_folder_is_as_contracted(trained, folder):
    manifest = Manifest.read(trained)
    assert manifest.base_model == str(folder / "base")
    assert [entry.name for entry in manifest.members] == ["member_00", "member_01"]
    assert [entry.seed for entry in manifest.members] == [0, 1]
    assert not (trained / ".training").exists()
    for entry in manifest.members:
        assert entry.status == "complete"
        assert sorted(entry.epochs) == [1, 2, 3]
        for path in (entry.folder, *entry.epochs.values()):
            for file in ("adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml"):
                assert entry.files[f"{path}/{file}"] == sha256(trained / path / file)
            config = json.loads((trained / path / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == str(folder / "base")
            assert config["inference_mode"]
            base = AutoModelForCausalLM.from_pretrained(folder / "base")
            PeftModel.from_pretrained(base, trained / path)
    last, final = (trained / "member_00" / p for p in ("epoch_03", "."))
    assert sha256(last / "adapter_model.safetensors") == sha256(final / "adapter_model.safetensors")


def test_metrics_show_every_epoch_of_every_member_and_of_the_ensemble(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert [line["step"] for line in lines] == [0, 6, 12, 18]
    assert lines[0]["ensemble"]["mutual_information"] == pytest.approx(0, abs=1e-12)
    assert lines[0]["members"]["member_00"] == lines[0]["members"]["member_01"]
    for line in lines[1:]:
        assert line["ensemble"]["mutual_information"] > 0
        members = [line["members"][name] for name in ("member_00", "member_01")]
        # Jensen: the mixture's NLL is never above the mean of the members'
        assert line["ensemble"]["nll"] <= np.mean([member["nll"] for member in members]) + 1e-12
        assert all(0 < member["loss"] < 9 for member in members)


def test_validation_nll_is_lm_evals_loglikelihoods(trained, folder):
    """The stored loglikelihoods are those that lm-eval computes with the exported adapter."""
    from lm_eval.models.huggingface import HFLM

    from lm_eval_lora_ensemble.train import examples

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = HFLM(
        pretrained=PeftModel.from_pretrained(base, trained / "member_01").eval(),
        tokenizer=str(folder / "base"),
    )
    stored = np.load(trained / "member_01" / "validation" / "epoch_03.npy")
    task = examples.load_tasks(["tiny_colours"], str(folder / "tasks"))["tiny_colours"]
    for row, doc in zip(stored, task.validation_docs(), strict=True):
        requests = task.construct_requests(doc=doc, ctx=task.fewshot_context(doc, 0), metadata=("t", 0, 1))
        theirs = [ll for ll, _ in model.loglikelihood(requests, disable_tqdm=True)]
        np.testing.assert_allclose(row[: len(theirs)], theirs, atol=1e-4)
        assert np.isneginf(row[len(theirs) :]).all()


class StopError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("after", [1, 2, 7, 12, 17])
@pytest.mark.parametrize("engine", ["joint", "plain"])
def test_a_stopped_run_ends_with_the_files_of_one_that_was_not(folder, tmp_path, monkeypatch, after, engine):
    if engine == "plain" and after not in {2, 7}:
        pytest.skip("the loop is the same; two instants will do")
    setting = SETTING | {"engine": engine}
    reference = folder / f"reference_{engine}"
    if not reference.exists():
        train_members(make_recipe(folder, output=str(reference), **setting))
    recipe = make_recipe(folder, output=str(tmp_path / "stopped"), **setting)
    stop_after(monkeypatch, after)
    with pytest.raises(StopError):
        train_members(recipe)
    assert not (tmp_path / "stopped" / "ensemble.json").exists()
    monkeypatch.undo()
    quick(monkeypatch)
    assert contents(train_members(recipe)) == contents(reference)


def stop_after(monkeypatch, steps):
    """Raise in the step after ``steps`` steps."""
    for engine in (JointEngine, PlainEngine):

        def step(self, batches, number, active, original=engine.step):
            if number == steps:
                raise StopError
            return original(self, batches, number, active)

        monkeypatch.setattr(engine, "step", step)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    folder, tmp_path, monkeypatch, trained, caplog
):
    recipe = make_recipe(folder, output=str(tmp_path / "e"), **SETTING)
    stop_after(monkeypatch, 5)
    with pytest.raises(StopError):
        train_members(recipe)
    newest = tmp_path / "e" / ".training" / "member_01" / "step_00000004"
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step_00000002", "step_00000004"]
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    monkeypatch.undo()
    quick(monkeypatch)
    with caplog.at_level("INFO"):
        train_members(recipe)
    assert f"Checkpoint {newest} is damaged" in caplog.text
    assert "Going on from step 2 of 18" in caplog.text
    assert contents(tmp_path / "e") == contents(trained)


def test_members_can_be_trained_one_by_one_and_make_the_same_folder(folder, tmp_path, trained):
    recipe = make_recipe(folder, output=str(tmp_path / "e"), **SETTING)
    train_members(recipe, member=1)
    assert not (tmp_path / "e" / "ensemble.json").exists()
    train_members(recipe, member=0)
    assert contents(tmp_path / "e") == contents(trained)
    with pytest.raises(EnsembleError, match="--member 2: the recipe has 2 members"):
        train_members(make_recipe(folder, output=str(tmp_path / "f"), **SETTING), member=2)


def test_a_regrouped_run_goes_on(folder, tmp_path, monkeypatch, trained):
    """Stopped jointly, finished one by one."""
    recipe = make_recipe(folder, output=str(tmp_path / "e"), **SETTING)
    stop_after(monkeypatch, 9)
    with pytest.raises(StopError):
        train_members(recipe)
    monkeypatch.undo()
    quick(monkeypatch)
    for member in (1, 0):
        train_members(recipe, member=member)
    assert contents(tmp_path / "e") == contents(trained)


def test_a_complete_folder_is_left_alone(trained, folder):
    before = contents(trained)
    stamps = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    train_members(make_recipe(folder, output=str(trained), **SETTING))
    assert contents(trained) == before
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == stamps


def test_a_changed_recipe_is_refused_by_its_keys(trained, folder):
    with pytest.raises(EnsembleError, match=r"begun with another recipe: rank, learning_rate changed"):
        train_members(make_recipe(folder, output=str(trained), **SETTING, rank=4, learning_rate=1.0))


def test_a_foreign_folder_is_refused(folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(EnsembleError, match=r"holds thesis\.tex but no recipe\.yaml"):
        train_members(make_recipe(folder, output=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_output(folder, tmp_path):
    (tmp_path / "e").write_text("mine")
    with pytest.raises(EnsembleError, match=r"/e is a file; name a folder"):
        train_members(make_recipe(folder, output=str(tmp_path / "e"), **SETTING))
    assert (tmp_path / "e").read_text() == "mine"


def test_a_second_process_is_refused(folder, tmp_path):
    recipe = make_recipe(folder, output=str(tmp_path / "e"))
    (tmp_path / "e" / ".training").mkdir(parents=True)
    with FileLock(tmp_path / "e" / ".training" / "member_01.lock"):
        code = (
            "import sys; from lm_eval_lora_ensemble.train.folder import EnsembleFolder\n"
            "from lm_eval_lora_ensemble.train.recipe import Recipe\n"
            "import yaml; folder = EnsembleFolder(Recipe.from_mapping(yaml.safe_load(sys.stdin)))\n"
            "with folder.claim(folder.names): pass"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], input=recipe.as_yaml(), capture_output=True, text=True, check=False
        )
    assert "EnsembleError: another process is training member_01 in" in done.stderr


@pytest.mark.parametrize("after", [".training/member_01/step_*", "member_01/epoch_01"])
def test_a_full_disk_leaves_the_last_checkpoint_intact(folder, tmp_path, monkeypatch, trained, after):
    recipe = make_recipe(folder, output=str(tmp_path / "e"), **SETTING)
    real = disk.flush

    def flush(path):
        if any((tmp_path / "e").glob(after)):
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(disk, "flush", flush)
    with pytest.raises(EnsembleError, match=r"cannot write in .*: No space left on device; make room"):
        train_members(recipe)
    monkeypatch.undo()
    quick(monkeypatch)
    assert any((tmp_path / "e" / ".training").glob("member_0*/step_*"))
    assert any((tmp_path / "e").glob("member_0*/epoch_*")) == ("epoch" in after)
    assert contents(train_members(recipe)) == contents(trained)


def test_members_that_stopped_apart_do_not_begin_anew_together(folder, tmp_path, monkeypatch, trained):
    recipe = make_recipe(folder, output=str(tmp_path / "e"), **SETTING)
    for member, steps in ((0, 9), (1, 3)):
        stop_after(monkeypatch, steps)
        with pytest.raises(StopError):
            train_members(recipe, member=member)
        monkeypatch.undo()
        quick(monkeypatch)
    with pytest.raises(
        EnsembleError, match=r"trained apart \(member_00 at step 8, member_01 at step 2\); .*--member I"
    ):
        train_members(recipe)
    for member in (0, 1):
        train_members(recipe, member=member)
    assert contents(tmp_path / "e") == contents(trained)


@pytest.mark.parametrize("engine", ["joint", "plain"])
def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(folder, tmp_path, monkeypatch, engine):
    """The loss may be finite all the same, in half precision above all."""
    clip = torch.nn.utils.clip_grad_norm_

    def overflowing(parameters, *limits):
        if overflowing.steps == 4:
            next(iter(parameters)).grad.fill_(torch.inf)
        overflowing.steps += 1
        return clip(parameters, *limits)

    overflowing.steps = 0
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflowing)
    setting = {"epochs": 1, "members": 1, "checkpoint_steps": 1, "gradient_clip": 1.0, "engine": engine}
    with pytest.raises(EnsembleError, match="a gradient is inf at step 5; lower learning_rate"):
        train_members(make_recipe(folder, output=str(tmp_path / "e"), **setting))
    steps = sorted(path.name for path in (tmp_path / "e" / ".training" / "member_00").glob("step_*"))
    assert steps[-1] == "step_00000004"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_refused(folder, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(EnsembleError, match="cannot write in"):
        train_members(make_recipe(folder, output=str(tmp_path / "e")))


def test_a_nan_loss_leaves_nothing_behind(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        base.model.norm.weight[3] = torch.nan
    shutil.copytree(folder / "base", tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    recipe = make_recipe(
        folder, base_model=str(tmp_path / "base"), output=str(tmp_path / "e"), validation_limit=0
    )
    with pytest.raises(EnsembleError, match="the loss of member_00 is nan at step 1; lower learning_rate"):
        train_members(recipe)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "changes", [{"task": "nothing_like_it"}, {"max_length": 9}, {"target_modules": ["x"]}]
)
def test_a_refused_recipe_leaves_nothing_behind(folder, tmp_path, changes):
    recipe = make_recipe(folder, output=str(tmp_path / "e"), **changes)
    for existed in (False, True):
        with pytest.raises(EnsembleError):
            train_members(recipe)
        assert (tmp_path / "e").exists() == existed
        (tmp_path / "e").mkdir(exist_ok=True)
        assert list((tmp_path / "e").iterdir()) == []


def test_steps_bound_a_run_and_the_last_part_counts_as_an_epoch(folder, tmp_path):
    out = train_members(
        make_recipe(folder, output=str(tmp_path / "e"), epochs=9, max_steps=8, validation_limit=0)
    )
    manifest = Manifest.read(out)
    assert sorted(manifest.members[0].epochs) == [1, 2]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 6, 8]
    assert lines[-1]["ensemble"] is None


def test_early_stopping_keeps_the_best_epoch(folder, tmp_path):
    recipe = make_recipe(
        folder, output=str(tmp_path / "e"), epochs=30, early_stopping=2, learning_rate=0.05, members=3
    )
    manifest = Manifest.read(train_members(recipe))
    ends = set()
    for entry in manifest.members:
        records = [json.loads(line) for line in (tmp_path / "e" / entry.name / "epochs.jsonl").open()]
        best = min(records[1:], key=lambda record: record["nll"])["epoch"]
        final = tmp_path / "e" / entry.name
        name = "adapter_model.safetensors"
        assert sha256(final / name) == sha256(final / f"epoch_{best:02d}" / name)
        assert records[-1]["epoch"] == best + 2
        assert records[-1]["stopped"]
        assert max(entry.epochs) == best + 2
        ends.add(best + 2)
    lines = (tmp_path / "e" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == max(ends) + 1


def test_an_ensemble_can_be_continued(folder, tmp_path, trained):
    out = train_members(
        make_recipe(
            folder, output=str(tmp_path / "e"), initial_adapters=str(trained), epochs=1, learning_rate=1e-12
        )
    )
    before, after = (
        json.loads((path / "metrics.jsonl").read_text().splitlines()[i])["ensemble"]["nll"]
        for path, i in ((trained, -1), (out, 0))
    )
    assert after == pytest.approx(before, abs=1e-9)
    with pytest.raises(EnsembleError, match=r"does not fit the recipe|has other layers"):
        train_members(make_recipe(folder, output=str(tmp_path / "f"), initial_adapters=str(trained), rank=3))
    with pytest.raises(EnsembleError, match="hold 2 adapters for 3 members; set members=2"):
        train_members(
            make_recipe(folder, output=str(tmp_path / "f"), initial_adapters=str(trained), members=3)
        )


def test_tensorboard_sees_losses_and_measures(folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train_members(make_recipe(folder, output=str(tmp_path / "e"), report_to="tensorboard"))
    events = EventAccumulator(str(next((out / ".logs").rglob("*tfevents*")).parent)).Reload()
    assert {"loss/member_00", "loss/member_01", "learning_rate", "nll/member_01"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("loss/member_00")] == [1, 2, 3, 4, 5, 6]


def test_an_unknown_tracker_is_refused(folder, tmp_path):
    with pytest.raises(EnsembleError, match="report_to=nonsense"):
        train_members(make_recipe(folder, output=str(tmp_path / "e"), report_to="nonsense"))


def test_the_command_line_trains_and_its_errors_are_one_line(folder, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe(folder, output=str(tmp_path / "e")).as_yaml())
    assert cli.main(["train", str(path), "members=1", "max_steps=1"]) == 0
    assert "lm_eval --model lora-ensemble --model_args adapters=" in capsys.readouterr().out
    assert cli.main(["train", str(path), "membres=1"]) == 2
    error = capsys.readouterr().err.strip()
    assert "unknown key 'membres'; did you mean 'members'?" in error
    assert "\n" not in error


RUN = """
import sys
sys.path.insert(0, {tests!r})
import pytest, torch
torch.set_num_threads(1)
from train_fixtures import quick
quick(pytest.MonkeyPatch())
sys.argv[0] = {script!r}
import runpy
runpy.run_path({script!r}, run_name="__main__")
"""

SHARES = """
import os
from lm_eval_lora_ensemble.train.trainer import Trainer
train = Trainer.run
def tell(self):
    print(f"process {os.environ['RANK']} trains {' '.join(self.members)}\\n", end="", flush=True)
    train(self)
Trainer.run = tell
"""


def test_ctrl_c_says_in_one_line_what_is_kept(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    endless = {**SETTING, "epochs": 1000}
    recipe.write_text(make_recipe(folder, output=str(tmp_path / "e"), **endless).as_yaml())
    tests = Path(__file__).parent
    launcher = tmp_path / "launch.py"
    launcher.write_text(RUN.format(tests=str(tests), script=str(tests.parent / "train" / "train_members.py")))
    command = [sys.executable, str(launcher), str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        deadline = time.monotonic() + 200
        first = tmp_path / "e" / "member_00" / "epoch_01"
        while not first.is_dir() and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.rstrip().splitlines()[-1] == (
        f"lora-ensemble: stopped; finished epochs and the last checkpoint are kept in {tmp_path / 'e'}; "
        "the same command goes on from there"
    )
    assert "Traceback" not in said


def test_two_processes_share_the_members_and_make_the_same_folder(folder, tmp_path, trained):
    """Two processes over the script in train/."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(folder, output=str(tmp_path / "e"), **SETTING).as_yaml())
    tests = Path(__file__).parent
    launcher = tmp_path / "launch.py"
    told = SHARES + RUN.format(tests=str(tests), script=str(tests.parent / "train" / "train_members.py"))
    launcher.write_text(told)
    done = in_two_processes(str(launcher), str(recipe), timeout=300)
    assert sorted(line for line in done.stdout.splitlines() if "trains" in line) == [
        "process 0 trains member_00",
        "process 1 trains member_01",
    ]
    assert contents(tmp_path / "e") == contents(trained)
    shutil.rmtree(tmp_path / "e")


def test_check_only_reads_and_names_the_way_out(tmp_path, trained, capsys):
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    weights = copy / "member_01" / "epoch_02" / "adapter_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + b"!")
    assert cli.main(["check", str(copy)]) == 2
    assert "epoch_02/adapter_model.safetensors differs from its checksum" in capsys.readouterr().out
    weights.write_bytes(sound)
    (copy / "ensemble.json").unlink()
    before = contents(copy)
    assert cli.main(["check", str(copy)]) == 2
    said = capsys.readouterr().err
    assert f"{copy} is a training run without ensemble.json" in said and said.count("\n") == 1
    assert f"`lora-ensemble train {copy / 'recipe.yaml'} --complete`" in said
    assert contents(copy) == before
    assert cli.main(["check", str(copy / "member_00")]) == 0  # a member's own folder holds a recipe too


def test_complete_writes_the_manifest_of_a_moved_folder(tmp_path, trained, capsys):
    copy = Path(shutil.copytree(trained, tmp_path / "moved"))
    (copy / "ensemble.json").unlink()
    assert cli.main(["train", str(copy / "recipe.yaml"), "--complete"]) == 0
    assert f"{copy / 'ensemble.json'} describes all 2 members" in capsys.readouterr().out
    assert contents(copy) == contents(trained)
    assert cli.main(["check", str(copy)]) == 0
    assert cli.main(["train", str(copy / "recipe.yaml"), "--complete"]) == 0  # as often as one likes
    assert contents(copy) == contents(trained)


def test_complete_trains_nothing(folder, tmp_path, trained, capsys):
    recipe = make_recipe(folder, output=str(tmp_path / "e"), **SETTING)
    train_members(recipe, member=1)
    moved = (tmp_path / "e").rename(tmp_path / "moved")
    before = contents(moved)
    path = str(moved / "recipe.yaml")
    assert cli.main(["train", path, "--complete"]) == 2
    assert f"{moved} still lacks member_00; give --member I instead of --complete" in capsys.readouterr().err
    assert contents(moved) == before
    assert cli.main(["train", path, "--member", "0"]) == 0
    assert contents(moved) == contents(trained)
    assert not (tmp_path / "e").exists()


def test_complete_and_member_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "quickstart", "--complete", "--member", "0"])
    assert "not allowed with argument --complete" in capsys.readouterr().err
