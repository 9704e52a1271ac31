"""The modules of docs/study, which is no package that anybody installs."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

from conftest import PROJECT


def study_modules(package: str, *names: str) -> SimpleNamespace:
    """Import a study's modules and those that all studies share, whose page is ``markdown``."""
    sys.path.insert(0, str(PROJECT / "docs" / "study"))
    try:
        own = {name: importlib.import_module(f"{package}.{name}") for name in names}
        shared = {
            name: importlib.import_module(f"stepwise.{name}")
            for name in ("archive", "command", "running", "values")
        }
        return SimpleNamespace(markdown=importlib.import_module("stepwise.page"), **own, **shared)
    finally:
        sys.path.pop(0)
