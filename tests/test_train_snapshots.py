"""Snapshots on the way, and the constant rate that makes them worth averaging."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_train_run import StopError, contents
from train_fixtures import (  # noqa: F401
    largest_difference,
    make_recipe,
    make_trainer,
    one_thread,
    quick,
    quick_tasks,
    train_steps,
)
from transformers import AutoModelForCausalLM

from lm_eval_lora_ensemble.cli import main
from lm_eval_lora_ensemble.disk import sha256
from lm_eval_lora_ensemble.ensemble.manifest import Manifest
from lm_eval_lora_ensemble.ensemble.members import find_sources
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train.joint import JointEngine
from lm_eval_lora_ensemble.train.optimiser import learning_rate
from lm_eval_lora_ensemble.train.run import train_members

# 3 epochs of 6 steps; the constant rate begins after step 6, so 10, 14 and 18 are kept
SETTING = {
    "epochs": 3,
    "keep_snapshots": 4,
    "swa_start": 0.35,
    "swa_learning_rate": 2e-3,
    "schedule": "linear",
    "checkpoint_steps": 5,
}
KEPT = [10, 14, 18]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshots")
    make_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        return train_members(make_recipe(folder, output=str(folder / "trained"), **SETTING))


def test_snapshots_are_the_members_after_those_steps(trained, folder):
    recipe = make_recipe(folder, **SETTING)
    for step in KEPT:
        weights = train_steps(make_trainer(recipe), step)
        for name in ("member_00", "member_01"):
            kept = load_file(trained / name / f"step_{step:08d}" / "adapter_model.safetensors")
            assert largest_difference(kept, weights[name]) == 0.0


def test_snapshots_are_plain_adapters_in_the_manifest(trained, folder, capsys):
    for entry in Manifest.read(trained).members:
        assert entry.steps == {step: f"{entry.name}/step_{step:08d}" for step in KEPT}
        assert sorted(entry.epochs) == [1, 2, 3]
        for path in entry.steps.values():
            for file in ("adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml"):
                assert entry.files[f"{path}/{file}"] == sha256(trained / path / file)
            base = AutoModelForCausalLM.from_pretrained(folder / "base")
            PeftModel.from_pretrained(base, trained / path)
    assert [sorted(source.steps) for source in find_sources(trained)[0]] == [KEPT, KEPT]
    assert main(["check", str(trained)]) == 0
    (trained / "member_01" / "step_00000014" / "README.md").rename(trained / "away")
    assert main(["check", str(trained)]) == 2
    assert "step_00000014/README.md is missing" in capsys.readouterr().out
    (trained / "away").rename(trained / "member_01" / "step_00000014" / "README.md")


@pytest.mark.parametrize("after", [8, 10, 12, 17])
def test_a_stopped_run_ends_with_the_same_snapshots(trained, folder, tmp_path, monkeypatch, after):
    recipe = make_recipe(folder, output=str(tmp_path / "stopped"), **SETTING)
    original = JointEngine.step

    def stop(engine, batches, step, active):
        if step == after:
            raise StopError
        return original(engine, batches, step, active)

    with monkeypatch.context() as patch:
        patch.setattr(JointEngine, "step", stop)
        with pytest.raises(StopError):
            train_members(recipe)
    assert contents(train_members(recipe)) == contents(trained)


def test_members_alone_leave_the_same_snapshots(trained, folder, tmp_path):
    recipe = make_recipe(folder, output=str(tmp_path / "alone"), **SETTING)
    train_members(recipe, 1)
    train_members(recipe, 0)
    assert contents(tmp_path / "alone") == contents(trained)


def test_a_member_that_stops_early_keeps_what_it_has(folder, tmp_path):
    keys = {"keep_snapshots": 5, "early_stopping": 1, "epochs": 4, "learning_rate": 0.3, "seed": 3}
    output = train_members(make_recipe(folder, output=str(tmp_path / "early"), **keys))
    records = {e.name: (output / e.name / "epochs.jsonl").read_text() for e in Manifest.read(output).members}
    last = {name: json.loads(lines.splitlines()[-1])["step"] for name, lines in records.items()}
    assert min(last.values()) < 24
    for entry in Manifest.read(output).members:
        assert sorted(entry.steps) == list(range(5, last[entry.name] + 1, 5))


@pytest.mark.parametrize(("start", "first"), [(0.5, 50), (50, 50), (0, 0), (0.999, 100)])
def test_the_rate_is_constant_from_swa_start_on(folder, start, first):
    keys = {"learning_rate": 0.1, "schedule": "cosine", "warmup_steps": 10}
    before = make_recipe(folder, **keys)
    recipe = make_recipe(folder, swa_start=start, swa_learning_rate=0.03, **keys)
    for step in range(100):
        expected = learning_rate(before, step, 100) if step < first else 0.03
        assert learning_rate(recipe, step, 100) == expected
    assert learning_rate(make_recipe(folder, swa_start=start, **keys), first, 100) == 0.1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"swa_start": 18}, r"swa_start is 18, step 18, and the run has 18 steps; give an earlier"),
        ({"keep_snapshots": 19}, r"keep_snapshots is every 19 steps, and the run has 18 steps, so none"),
        ({"swa_start": 0.5, "keep_snapshots": 10}, r"every 10 steps from step 9 on, and the run has 18"),
    ],
)
def test_what_would_keep_nothing_is_refused_before_anything_is_written(folder, tmp_path, keys, message):
    recipe = make_recipe(folder, output=str(tmp_path / "none"), epochs=3, **keys)
    with pytest.raises(EnsembleError, match=message):
        train_members(recipe)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"swa_learning_rate": 0.1}, "swa_learning_rate without swa_start; say where it begins"),
        ({"swa_start": 1.5}, "swa_start is 1.5, it must be a share of the run below 1, or a whole number"),
        ({"swa_start": True}, "swa_start is True, it must be"),
        ({"keep_snapshots": "step"}, "keep_snapshots is 'step', it must be epoch, or a whole number"),
        ({"keep_snapshots": 0}, "keep_snapshots is 0, it must be epoch, or"),
        ({"ivon_ess": 10}, "ivon_ess is for optimizer=ivon, not for adamw; remove one of the two"),
        ({"blob_prior": 1}, "blob_prior is for posterior=blob, not for none; remove one of the two"),
        ({"optimizer": "ivon", "posterior": "blob"}, "trains one posterior and posterior=blob another"),
        (
            {"optimizer": "ivon", "dora": True},
            "optimizer=ivon has none over DoRA's magnitudes; remove it, or dora",
        ),
        (
            {"posterior": "blob", "dora": True},
            "posterior=blob has none over DoRA's magnitudes; remove it, or dora",
        ),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', it must be one of adamw, ivon"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(folder, keys, message):
    with pytest.raises(EnsembleError, match=message):
        make_recipe(folder, **keys)
