"""Write the tables of draw.md from the registry: ``python docs/methods.py``; a test holds the page against it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lm_eval_lora_ensemble.posterior.options import Option
from lm_eval_lora_ensemble.posterior.registry import (
    COMMAND,
    COMMAND_OF_SNAPSHOTS,
    COMMAND_OF_TASKS,
    METHODS,
    Method,
)

PAGE = Path(__file__).parent / "draw.md"

_NEEDS = {
    "adapter": "one adapter",
    "snapshots": "the kept snapshots of a run",
    "state": "a run that was trained for it",
}
_PLACE = re.compile(r"(<!-- draw: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """Return the page with every table between its markers as the registry has it."""
    return _PLACE.sub(lambda place: place[1] + _TABLES[place[2]]() + place[3], page)


def built_in() -> list[Method]:
    """Return the package's own methods, those of one adapter first."""
    own = [method for method in METHODS.values() if method.built_in]
    return sorted(own, key=lambda method: (list(_NEEDS).index(method.needs), method.task, method.name))


def methods_table() -> str:
    """Return a line a method: what it is, what it needs, where it is from."""
    rows = [("method", "what it is", "needs", "source")]
    for method in built_in():
        needs = _NEEDS[method.needs] + (", a task" if method.task else "")
        if method.every_member:
            needs += ", of every member"
        rows.append((f"`{method.name}`", method.title, needs, method.source))
    return _table(rows)


def options_table() -> str:
    """Return a line an option of every method."""
    rows = [("method", "option", "value", "default", "meaning")]
    for method in built_in():
        for name, option in method.options.items():
            rows.append((f"`{method.name}`", *_about(name, option)))
    return _table(rows)


def command_table() -> str:
    """Return a line a key that the command takes, whatever the method."""
    rows = [("key", "value", "default", "meaning")]
    keys: Mapping[str, Option] = {**COMMAND, **COMMAND_OF_SNAPSHOTS, **COMMAND_OF_TASKS}
    for name, option in keys.items():
        mark = "ˢ" if name in COMMAND_OF_SNAPSHOTS else "ᵗ" if name in COMMAND_OF_TASKS else ""
        key, *rest = _about(name, option)
        rows.append((f"{key}{mark}", *rest))
    return _table(rows)


def _about(name: str, option: Option) -> tuple[str, str, str, str]:
    default = "–" if option.default in (None, "") else f"`{option.default}`"
    return f"`{name}`", option.expectation, default, option.help


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


_TABLES = {"methods": methods_table, "options": options_table, "command": command_table}

if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
