"""A room imports floors below its own: the contracts of pyproject.toml hold, and are seen to break when they should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

PACKAGE = "lm_eval_lora_ensemble"


def copy_of(place: Path) -> Path:
    """Lay the trees out as they are installed, which test_install holds against the wheel."""
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / PACKAGE, place / PACKAGE, ignore=unwanted)
    for folder in ("tasks", "train"):
        shutil.copytree(PROJECT / folder, place / PACKAGE / folder, ignore=unwanted)
    return place


def in_copy(place: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run code that finds the copy before the checkout, which the environment's start-up file may have imported."""
    environment = {**os.environ, "PYTHONPATH": str(place)}
    check = f"import sys, {PACKAGE}; assert {PACKAGE}.__file__.startswith({str(place)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", check + code, *words],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def lint(place: Path) -> tuple[int, str]:
    """Run import-linter there as ``make typecheck`` does; return its status and what it said, in one line."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command(sys.argv[1:])"
    done = in_copy(place, code, str(PROJECT / "pyproject.toml"), "--no-cache", "--no-logo")
    assert "Contracts" in done.stdout, done.stderr[-3000:]
    return done.returncode, re.sub(r"\s+", " ", done.stdout)


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    return copy_of(tmp_path_factory.mktemp("installed"))


def test_the_graph_has_every_module_of_all_three_trees(copied):
    code = (
        f"import grimp, json; graph = grimp.build_graph({PACKAGE!r}, cache_dir=None)\n"
        "print(json.dumps(sorted(graph.modules)))"
    )
    done = in_copy(copied, code)
    assert done.returncode == 0, done.stderr[-3000:]
    modules = set(json.loads(done.stdout))
    assert {f"{PACKAGE}.train.recipe", f"{PACKAGE}.tasks.paper.paper_data"} <= modules
    files = {path.relative_to(copied).with_suffix("") for path in (copied / PACKAGE).rglob("*.py")}
    # a folder is the module of its __init__.py
    assert modules == {".".join(file.parts).removesuffix(".__init__") for file in files}


def test_every_room_imports_floors_below_its_own(copied):
    status, said = lint(copied)
    assert status == 0, said
    assert "floors KEPT" in said and "no circles KEPT" in said


CHANGES = {
    "upwards": (
        "metrics/information.py",
        "\n\ndef _never() -> None:\n    from lm_eval_lora_ensemble.harness import plugin\n",
        "lm_eval_lora_ensemble.metrics is not allowed to import lm_eval_lora_ensemble.harness",
    ),
    "upwards, for types alone": (
        "disk.py",
        "\n\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lm_eval_lora_ensemble.train.recipe\n",
        "lm_eval_lora_ensemble.disk is not allowed to import lm_eval_lora_ensemble.train",
    ),
    "beside": (
        "figures/curves.py",
        "\n\nfrom lm_eval_lora_ensemble.analysis import runs\n",
        "lm_eval_lora_ensemble.figures is not allowed to import lm_eval_lora_ensemble.analysis",
    ),
    "a circle in a room": (
        "report/page.py",
        "\n\ndef _never() -> None:\n    from lm_eval_lora_ensemble.report import build\n",
        "No cycles are allowed in lm_eval_lora_ensemble.report",
    ),
    "a room without a floor": ("attic/__init__.py", "", "- lm_eval_lora_ensemble.attic"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_import_turned_round_is_named(tmp_path, change):
    file, text, said = CHANGES[change]
    place = copy_of(tmp_path)
    assert said not in lint(place)[1]
    target = place / PACKAGE / file
    target.parent.mkdir(exist_ok=True)
    target.write_text((target.read_text() if target.exists() else "") + text)
    status, broken = lint(place)
    assert status != 0
    assert said in broken
