"""The tables of draw.md, from the registry of methods."""

from __future__ import annotations

from collections.abc import Mapping

from lm_eval_lora_ensemble.posterior.options import Option
from lm_eval_lora_ensemble.posterior.registry import (
    COMMAND,
    COMMAND_OF_SNAPSHOTS,
    COMMAND_OF_TASKS,
    METHODS,
    Method,
)
from tables import markdown_table

_NEEDS = {
    "adapter": "one adapter",
    "snapshots": "the kept snapshots of a run",
    "state": "a run that was trained for it",
}


def table(name: str) -> str:
    """Return the table of that name: ``methods``, ``options`` or ``command``."""
    return {"methods": _methods, "options": _options, "command": _command}[name]()


def built_in() -> list[Method]:
    """Return the package's own methods, those of one adapter first."""
    own = [method for method in METHODS.values() if method.built_in]
    return sorted(own, key=lambda method: (list(_NEEDS).index(method.needs), method.task, method.name))


def _methods() -> str:
    """Return a line a method: what it is, what it needs, where it is from."""
    rows = [("method", "what it is", "needs", "source")]
    for method in built_in():
        needs = _NEEDS[method.needs] + (", a task" if method.task else "")
        if method.every_member:
            needs += ", of every member"
        rows.append((f"`{method.name}`", method.title, needs, method.source))
    return markdown_table(rows)


def _options() -> str:
    """Return a line an option of every method."""
    rows = [("method", "option", "value", "default", "meaning")]
    for method in built_in():
        for name, option in method.options.items():
            rows.append((f"`{method.name}`", *_about(name, option)))
    return markdown_table(rows)


def _command() -> str:
    """Return a line a key that the command takes, whatever the method."""
    rows = [("key", "value", "default", "meaning")]
    keys: Mapping[str, Option] = {**COMMAND, **COMMAND_OF_SNAPSHOTS, **COMMAND_OF_TASKS}
    for name, option in keys.items():
        mark = "ˢ" if name in COMMAND_OF_SNAPSHOTS else "ᵗ" if name in COMMAND_OF_TASKS else ""
        key, *rest = _about(name, option)
        rows.append((f"{key}{mark}", *rest))
    return markdown_table(rows)


def _about(name: str, option: Option) -> tuple[str, str, str, str]:
    default = "–" if option.default in (None, "") else f"`{option.default}`"
    return f"`{name}`", option.expectation, default, option.help
