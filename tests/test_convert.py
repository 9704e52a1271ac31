"""``lora-ensemble convert``: pickled adapters become the safetensors they would have been, and hostile ones nothing."""

from __future__ import annotations

import collections
import os
import pickle
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import random_adapters
from hostile_adapters import CONFIG, LAYER, LFS_POINTER, WEIGHTS, Canary, config
from safetensors.torch import load_file
from test_model import PAIRS, instances, lora

from lm_eval_lora_ensemble.cli import main
from lm_eval_lora_ensemble.ensemble import convert
from lm_eval_lora_ensemble.ensemble.manifest import Manifest, MemberEntry

PICKLE = "adapter_model.bin"


def pickled(folder: Path) -> Path:
    """Let every adapter in ``folder`` have its weights as ``torch.save`` writes them, and only so."""
    for weights in folder.rglob(WEIGHTS):
        torch.save(load_file(weights), weights.with_name(PICKLE))
        weights.unlink()
    return folder


@pytest.fixture
def folder(ensemble: Path, tmp_path: Path) -> Path:
    for name in ("member_00", "member_01"):
        shutil.copytree(ensemble / name, tmp_path / "ensemble" / name)
    return pickled(tmp_path / "ensemble")


def scores(adapters: Path, **kwargs: object) -> np.ndarray:
    found = lora(adapters, **kwargs).loglikelihood(instances(PAIRS[:3]), disable_tqdm=True)
    return np.array([value.members for value, _ in found])


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_every_member_scores_what_its_safetensors_scored(ensemble, folder, capsys):
    before = files(folder)
    assert main(["convert", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"member_00: {WEIGHTS} written",
        f"member_01: {WEIGHTS} written",
    ]
    np.testing.assert_array_equal(scores(folder), scores(ensemble, members=2))
    after = files(folder)
    # the pickles stay, and beside the new files there is nothing else
    assert {name: after.pop(f"{name}/{WEIGHTS}") for name in ("member_00", "member_01")}
    assert after == before
    mode = (folder / "member_00" / WEIGHTS).stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE((folder / "member_00" / PICKLE).stat().st_mode)


def test_what_is_converted_already_is_said_and_checked(folder, capsys):
    main(["convert", str(folder)])
    times = {path: path.stat().st_mtime_ns for path in folder.rglob(WEIGHTS)}
    capsys.readouterr()
    assert main(["convert", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "member_00: already converted",
        "member_01: already converted",
    ]
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob(WEIGHTS)}
    os.truncate(folder / "member_01" / WEIGHTS, 100)
    assert main(["convert", str(folder)]) == 2
    assert "member_01: NOT CONVERTED, " in capsys.readouterr().out


def test_one_adapter_and_kept_epochs(ensemble, llama, tmp_path, capsys):
    alone = pickled(Path(shutil.copytree(ensemble / "member_00", tmp_path / "alone")))
    assert main(["convert", str(alone)]) == 0
    assert capsys.readouterr().out == f"member_00: {WEIGHTS} written\n"
    target = tmp_path / "ensemble"
    for name in ("member_00", "member_01"):
        shutil.copytree(ensemble / name, target / name)
        shutil.copytree(ensemble / name, target / name / "epoch_01")
    entries = [MemberEntry(name, name, epochs={1: f"{name}/epoch_01"}) for name in ("member_00", "member_01")]
    Manifest(str(llama), None, entries).write(target)
    manifest = (target / "ensemble.json").read_bytes()
    pickled(target)
    assert main(["convert", str(target)]) == 0
    assert f"member_01, epoch 1: {WEIGHTS} written" in capsys.readouterr().out
    assert len(list(target.rglob(WEIGHTS))) == 4
    assert (target / "ensemble.json").read_bytes() == manifest
    np.testing.assert_array_equal(scores(target, epoch=1), scores(ensemble, members=2))


KINDS: dict[str, dict[str, object]] = {
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_that_peft_itself_wrote(llama, tmp_path, kind, capsys):
    """PEFT's own ``safe_serialization=False``, against its own safetensors of the same adapter."""
    torch.manual_seed(5)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **KINDS[kind]}
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "safe")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / PICKLE).is_file() and not (tmp_path / "pickled" / WEIGHTS).exists()
    assert main(["convert", str(tmp_path / "pickled")]) == 0
    np.testing.assert_array_equal(scores(tmp_path / "pickled"), scores(tmp_path / "safe"))


def saved(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)

    return spoil


def of_the_first_releases(path: Path) -> None:
    """The format of torch before 1.6, half precision, parameters, and slices that share memory."""
    tensors = collections.OrderedDict()
    for name, tensor in torch.load(path, weights_only=True).items():
        wide = torch.cat([tensor, tensor]).half()
        tensors[name] = torch.nn.Parameter(wide[: len(tensor)])
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def test_pickles_of_the_first_releases(folder, capsys):
    expected = {
        name: tensor.half()
        for name, tensor in torch.load(folder / "member_01" / PICKLE, weights_only=True).items()
    }
    of_the_first_releases(folder / "member_01" / PICKLE)
    assert main(["convert", str(folder)]) == 0
    found = load_file(folder / "member_01" / WEIGHTS)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


A = f"{LAYER}.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty file": (lambda path: path.write_bytes(b""), "torch cannot read it (EOFError)"),
    "no pickle": (lambda path: path.write_text("hello"), "torch cannot read it"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "torch cannot read it"),
    "git-lfs": (lambda path: path.write_text(LFS_POINTER), "is a Git LFS pointer"),
    "terabytes of nothing": (lambda path: os.truncate(path, 1 << 40), "an adapter has at most"),
    "no tensors at all": (saved({}), "holds no LoRA matrices"),
    "a list": (saved([torch.ones(2)]), "it holds a list, not tensors by their names"),
    "a text among the tensors": (edited(lambda t: t.update(name="x")), "it holds a str under 'name'"),
    "tensors in tensors' place": (saved({"state_dict": {A: torch.ones(4, 48)}}), "a dict under 'state_dict'"),
    "sparse": (edited(lambda t: t.update({A: t[A].to_sparse()})), "is no plain tensor"),
    "nan": (edited(lambda t: t[A].__setitem__((0, 0), float("nan"))), "that is not finite"),
    "another rank": (edited(lambda t: t.update({A: t[A][:3]})), "not of rank 4 as configured"),
    "whole numbers": (edited(lambda t: t.update({A: t[A].int()})), "has type I32"),
    "a layer of the base": (
        edited(lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(48)})),
        "does not call for",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "that is not a file"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "that is not a file"),
    "linked away": (lambda path: (path.unlink(), path.symlink_to("/etc/hostname")), "which lies outside"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_adapter_is_refused_and_nothing_is_written(folder, capsys, case):
    spoil, reason = REFUSED[case]
    spoil(folder / "member_00" / PICKLE)
    names = sorted(path.name for path in (folder / "member_00").iterdir())
    assert main(["convert", str(folder / "member_00")]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("member_00: NOT CONVERTED, ") and reason in line and line.isprintable()
    assert str(folder / "member_00" / PICKLE) in line or "that is not a file" in line
    assert sorted(path.name for path in (folder / "member_00").iterdir()) == names


@pytest.mark.parametrize("how", ["plain", "torch", "among tensors"])
def test_a_hostile_pickle_is_refused_without_running(folder, tmp_path, capsys, how):
    """A pickle that makes a folder when it is read; that it would is shown first."""
    path, canary = folder / "member_00" / PICKLE, tmp_path / "canary"
    value = {"a": torch.ones(1), "b": Canary(canary)} if how == "among tensors" else Canary(canary)
    if how == "plain":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path)
    torch.load(path, weights_only=False) if how != "plain" else pickle.loads(path.read_bytes())
    assert canary.is_dir()
    canary.rmdir()
    assert main(["convert", str(folder)]) == 2
    assert not canary.exists() and not (path.parent / WEIGHTS).exists()
    # torch stops at the first opcode of a pickle that is not its own
    said = (
        "torch cannot read it" if how == "plain" else "it asks for posix.mkdir, which is code, not a tensor"
    )
    assert said in capsys.readouterr().out


def test_a_module_in_the_current_folder_is_not_imported_by_the_child(folder, tmp_path):
    """Whoever sends the adapter may send a torch.py beside it."""
    for place in (folder, folder / "member_00"):
        (place / "torch.py").write_text(f"import os; os.mkdir({str(tmp_path / 'canary')!r})")
        code = "import sys; from lm_eval_lora_ensemble.cli import main; sys.exit(main(['convert', '.']))"
        command = [sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": ""}
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "canary").exists()


def test_a_tensor_larger_than_its_file_explains_meets_a_limit(folder, capsys):
    """One stored number, spread over twelve gigabytes by its strides."""
    torch.save({A: torch.zeros(1).expand(1 << 31, 2)}, folder / "member_00" / PICKLE)
    assert main(["convert", str(folder)]) == 2
    assert "more memory than its size explains" in capsys.readouterr().out.splitlines()[0]


def test_a_pickle_that_takes_too_long_is_given_up(folder, capsys, monkeypatch):
    monkeypatch.setattr(convert, "_START_SECONDS", 0.05)
    assert main(["convert", str(folder)]) == 2
    assert capsys.readouterr().out.count("reading it took more than 0 s") == 2
    assert not list(folder.rglob(WEIGHTS)) and not list(folder.rglob(".unfinished-*"))


@pytest.mark.parametrize("release", ["2.4.1", "2.9.1+cu128"])
def test_a_torch_that_can_be_made_to_run_pickles_is_not_used(folder, capsys, monkeypatch, release):
    monkeypatch.setattr(convert, "version", lambda name: release)
    assert main(["convert", str(folder)]) == 2
    assert f"torch {release} has known ways to run code" in capsys.readouterr().out
    assert not list(folder.rglob(WEIGHTS))


def test_one_that_is_refused_does_not_keep_the_others_and_its_pickle_is_not_read(folder, capsys):
    config(peft_type="IA3")(folder / "member_00")
    (folder / "member_00" / PICKLE).write_bytes(b"")
    assert main(["convert", str(folder)]) == 2
    first, second = capsys.readouterr().out.splitlines()
    assert f"member_00/{CONFIG} is of type 'IA3', not LORA" in first
    assert second == f"member_01: {WEIGHTS} written"


def test_a_folder_without_either_and_no_folder_at_all(folder, tmp_path, capsys):
    (folder / "member_00" / PICKLE).unlink()
    assert main(["convert", str(folder)]) == 2
    assert "member_00: NOT CONVERTED, " in (out := capsys.readouterr().out) and f"has no {WEIGHTS}" in out
    assert main(["convert", "org/adapter"]) == 2
    assert "no adapter folder 'org/adapter' here" in capsys.readouterr().err


def test_random_adapters_in_other_types_come_out_as_they_were(llama, tmp_path):
    adapters = random_adapters(llama, tmp_path / "one", 1)
    tensors = {
        name: tensor.bfloat16() for name, tensor in load_file(adapters / "member_00" / WEIGHTS).items()
    }
    pickled(adapters)
    torch.save(tensors, adapters / "member_00" / PICKLE)
    assert main(["convert", str(adapters)]) == 0
    found = load_file(adapters / "member_00" / WEIGHTS)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
