"""What the package imports is what it declares, and an lm-eval that does not fit is named in one line."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import PROJECT

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness import compatibility

OWN = "lm_eval_lora_ensemble"


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def declared() -> tuple[set[str], dict[str, set[str]]]:
    """Return the distributions that the package needs, and those of each extra."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: set(map(distribution, of)) for name, of in project["optional-dependencies"].items()}
    return set(map(distribution, project["dependencies"])), extras


def imported(path: Path) -> set[str]:
    """Return the top-level names that a file imports anywhere, the standard library's left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names) - {OWN}


def modules() -> list[Path]:
    files = [path for folder in (OWN, "train", "tasks") for path in (PROJECT / folder).rglob("*.py")]
    assert {path.relative_to(PROJECT).parts[0] for path in files} == {OWN, "train", "tasks"}
    return files


@functools.cache
def by_import_name() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()  # reads every file list: a quarter of a second


def distributions_of(names: set[str]) -> set[str]:
    by_import = by_import_name()
    return {by_import[name][0].lower().replace("_", "-") for name in names}


def test_every_import_is_declared():
    needed, extras = declared()
    known = needed.union(*(of for extra, of in extras.items() if extra != "dev"))
    for path in modules():
        missing = distributions_of(imported(path)) - known
        assert not missing, f"{path} imports {missing}, which pyproject.toml does not declare"


def test_everything_declared_is_imported():
    """What the package imports by itself; a reader of dtypes or files that others import is listed here."""
    needed, _ = declared()
    seen = distributions_of({name for path in modules() for name in imported(path)})
    assert needed - seen == set()


def test_an_import_that_is_not_declared_would_be_seen(tmp_path):
    (tmp_path / "one.py").write_text("def f():\n    import sklearn.metrics\n    from pandas import Series\n")
    assert distributions_of(imported(tmp_path / "one.py")) == {"scikit-learn", "pandas"}
    needed, extras = declared()
    assert not {"scikit-learn", "pandas"} & (needed | extras["report"] | extras["quickstart"])


# --------------------------------------------------------------------------------------------- lm-eval


def test_the_installed_lm_eval_has_what_is_needed():
    compatibility.require_lm_eval()
    needed, _ = declared()
    assert "lm-eval" in needed
    assert f'"{compatibility.WANTED}"' in (PROJECT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ("0.4.12", "is older than 0.4.13"),
        ("0.5.0", "computes metrics otherwise"),
        ("0.5.0.dev1", "otherwise"),
    ],
)
def test_an_lm_eval_of_another_version_is_refused(monkeypatch, installed, said):
    monkeypatch.setattr(compatibility, "version", lambda name: installed)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(EnsembleError, match=rf"\({re.escape(installed)}\).*{said}.*'lm-eval>=0.4.13,<0.5'"):
        compatibility.require_lm_eval()


@pytest.mark.parametrize("installed", ["0.4.13", "0.4.14.dev0", "0.4.99"])
def test_versions_that_fit(monkeypatch, installed):
    monkeypatch.setattr(compatibility, "version", lambda name: installed)
    compatibility.require_lm_eval()


@pytest.mark.parametrize(
    ("spoil", "lacks"),
    [
        (
            "import lm_eval.utils; del lm_eval.utils.make_disjoint_window",
            "lm_eval.utils.make_disjoint_window",
        ),
        ("import lm_eval.loggers as l; del l.EvaluationTracker.save_results_samples", "save_results_samples"),
        ("import sys; sys.modules['lm_eval.config.group'] = None", "lm_eval.api.group.Group.aggregate"),
    ],
)
def test_an_lm_eval_without_an_internal_gives_one_line(spoil, lacks):
    as_command = "import sys; sys.modules['__main__'].__file__ = 'lm_eval'"  # where errors are one line
    code = f"{as_command}\n{spoil}\nfrom lm_eval_lora_ensemble.harness.model import LoraEnsembleLM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("lora-ensemble: error: the installed lm-eval (0.4.13) has no ")
    assert lacks in last and "pip install 'lm-eval>=0.4.13,<0.5'" in last
