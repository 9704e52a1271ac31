"""Where the folders ``tasks`` and ``train`` are: in a wheel, an editable install and a plain checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    """Return the folder of a sub-package that lives at the project's top level until it is installed."""
    for parent in (_PACKAGE, _PACKAGE.parent):
        if (parent / name / "__init__.py").is_file():
            return parent / name
    raise FileNotFoundError(f"{name}/ is neither in {_PACKAGE} nor beside it; the installation is incomplete")


def tasks_folder() -> Path:
    """Return the folder of lm-eval task YAMLs."""
    return _folder("tasks")


def recipes_folder() -> Path:
    """Return the folder of training recipes."""
    return _folder("train") / "recipes"
