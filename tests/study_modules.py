"""The modules of docs/study, which is no package that anybody installs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def write_records(output: Path, records: Mapping[str, Any]) -> None:
    """Write a study's records where its own steps would have."""
    for name, record in records.items():
        path = output / "records" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(vars(record)))
