"""An ensemble with results, the command on it, and what it may have written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import DATA
from report_fixtures import write_run

from lm_eval_lora_ensemble.cli import main

RELEASE = DATA / "release_0_1_0"
RESAMPLES = 60
Edit = Callable[[dict], None]


def make_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder with ./ensemble of two trained members with checksums of their README.md, and ./results of it."""
    for name in ("ensemble", "results"):
        shutil.copytree(RELEASE / name, folder / name)
    monkeypatch.chdir(folder)
    return folder


def card(*arguments: object, results: Sequence[object] = ("results",)) -> int:
    return main(["card", "ensemble", *map(str, results), "--resamples", str(RESAMPLES), *map(str, arguments)])


def text(path: Path = Path("ensemble")) -> str:
    return (path / "README.md").read_text(encoding="utf-8")


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_results(folder: Path, edit: Edit) -> None:
    (file,) = folder.rglob("results_*.json")
    said = json.loads(file.read_text())
    edit(said)
    file.write_text(json.dumps(said))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, **keys: object) -> str:
    before = contents(Path())
    capsys.readouterr()
    assert card(*arguments, **keys) == 2
    assert contents(Path()) == before, "a refusal wrote something"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def synthetic(
    folder: Path, base: str, members: list[str], tasks: dict[str, int] | None = None, **keys: object
) -> Path:
    """A run that says it scored these members."""
    said = {
        "base_model": base,
        "epoch": None,
        "fingerprint": "f",
        "members": [{"sha256": one} for one in members],
    }
    config = {"model": "lora-ensemble", "model_args": {"adapters": "there"}, "lora_ensemble": said}
    return write_run(folder, tasks or {"quiz": 40}, members=max(1, len(members)), config=config, **keys)
