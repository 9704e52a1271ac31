"""Write the tables of metrics.md from the registry: ``python docs/tables.py``; a test holds the page against it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lm_eval_lora_ensemble.metrics.registry import METRICS, Metric

PAGE = Path(__file__).parent / "metrics.md"

_HEAD = ("name", "definition", "range", "better", "needs", "source")
_ARROWS = {"higher": "↑", "lower": "↓", "": "–"}
_PLACE = re.compile(r"(<!-- metrics: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """Return the page with every table between its markers as the registry has it."""
    return _PLACE.sub(lambda place: place[1] + table(place[2]) + place[3], page)


def table(file: str) -> str:
    """Return the table of the metrics that a file of metrics/definitions registers."""
    rows: dict[str, list[Metric]] = {}
    for metric in METRICS.values():
        if metric.built_in and metric.module.endswith(f".{file}"):
            rows.setdefault(metric.definition, []).append(metric)
    lines = [_HEAD, ("---",) * len(_HEAD), *(_row(same) for same in rows.values())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(same: Sequence[Metric]) -> tuple[str, ...]:
    """Return the line of metrics that share a definition."""
    first = same[0]
    needs = [*(["golds"] if first.needs_gold else []), *(["members"] if first.needs_members else [])]
    return (
        f"`{_common([metric.name for metric in same])}`{' †' if first.in_table else ''}",
        first.definition.replace("|", "\\|"),
        first.range,
        _ARROWS[first.direction],
        ", ".join(needs),
        first.source,
    )


def _common(names: Sequence[str]) -> str:
    """Return the names as one, with a star for the words in which they differ."""
    if len(names) == 1:
        return names[0]
    words = [name.split("_") for name in names]
    start = 0
    while len({tuple(name[: start + 1]) for name in words}) == 1:
        start += 1
    end = 0
    while len({tuple(name[-end - 1 :]) for name in words}) == 1:
        end += 1
    return "_".join([*words[0][:start], "*", *words[0][len(words[0]) - end :]])


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
