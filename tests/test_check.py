"""``lora-ensemble check`` and the command line around it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm_eval_lora_ensemble.cli import main
from lm_eval_lora_ensemble.disk import checksums
from lm_eval_lora_ensemble.ensemble.manifest import Manifest, MemberEntry


@pytest.fixture
def folder(ensemble: Path, llama: Path, tmp_path: Path) -> Path:
    """An ensemble with a manifest and one kept epoch a member."""
    target = Path(shutil.copytree(ensemble, tmp_path / "ensemble"))
    entries = []
    for i in range(3):
        name = f"member_{i:02d}"
        shutil.copytree(target / name, target / name / "epoch_01")
        files = checksums(target / name, target)
        entries.append(MemberEntry(name, name, i, {1: f"{name}/epoch_01"}, files))
    Manifest(str(llama), None, entries).write(target)
    return target


def weights(folder: Path) -> Path:
    return folder / "member_01" / "adapter_model.safetensors"


def change(path: Path, edit) -> None:
    tensors = load_file(path)
    name = next(iter(tensors))
    edit(tensors, name)
    save_file(tensors, path)


def test_a_sound_ensemble(folder, capsys):
    assert main(["check", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[3].startswith("3 members on ") and "fingerprint" in lines[3]
    assert (
        "member_01: ok, rank 4, 6 adapted layers" in lines[1]
        and "match their checksums, epochs 1" in lines[1]
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: change(weights(f), lambda t, n: t[n].__setitem__((0, 0), np.nan)), "is not finite"),
        (lambda f: change(weights(f), lambda t, n: t.pop(n)), "lacks one of lora_A and lora_B"),
        (lambda f: change(weights(f), lambda t, n: t.update({n: t[n][:3]})), "not of rank 4"),
        (lambda f: weights(f).write_bytes(weights(f).read_bytes()[:100]), "not a readable safetensors"),
        (lambda f: weights(f).write_bytes(b""), "not a readable safetensors"),
        (lambda f: (f / "member_01" / "README.md").write_text("other"), "differs from its checksum"),
        (lambda f: (f / "member_01" / "README.md").unlink(), "is missing"),
        (
            lambda f: change(f / "member_01/epoch_01/adapter_model.safetensors", lambda t, n: t.pop(n)),
            "lacks one",
        ),
    ],
)
def test_a_broken_member_is_named_and_the_others_are_still_checked(folder, capsys, spoil, said):
    spoil(folder)
    assert main(["check", str(folder)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("member_00: ok") and lines[2].startswith("member_02: ok")
    assert lines[1].startswith("member_01: BROKEN") and said in lines[1]


def test_another_kind_of_adapter(folder, edit_json, capsys):
    edit_json(folder / "member_01" / "adapter_config.json", peft_type="IA3")
    assert main(["check", str(folder)]) == 2
    assert "of type 'IA3', not LORA" in capsys.readouterr().out


def test_a_member_twice_is_said(ensemble, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(ensemble / "member_00", tmp_path / name)
    assert main(["check", str(tmp_path)]) == 0
    assert "WARNING: the same adapter as a" in capsys.readouterr().out


def test_user_errors_are_one_line_and_status_2(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lora-ensemble: error: no adapters in") and captured.err.count("\n") == 1


def test_help_check_and_convert_load_no_torch(folder):
    for arguments in (["--help"], ["check", str(folder)], ["convert", str(folder)]):
        code = (
            "import sys; from lm_eval_lora_ensemble.cli import main\n"
            f"try: main({arguments!r})\nexcept SystemExit: pass\n"
            "assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_that_goes_away_ends_it_quietly(folder):
    command = f"{sys.executable} -m lm_eval_lora_ensemble.cli check {folder} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
