"""The tables of metrics.md, from the registry of metrics."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval_lora_ensemble.metrics.registry import METRICS, Metric
from tables import markdown_table

_HEAD = ("name", "definition", "range", "better", "needs", "source")
_ARROWS = {"higher": "↑", "lower": "↓", "": "–"}


def table(file: str) -> str:
    """Return the table of the metrics that a file of metrics/definitions registers."""
    rows: dict[str, list[Metric]] = {}
    for metric in METRICS.values():
        if metric.built_in and metric.module.endswith(f".{file}"):
            rows.setdefault(metric.definition, []).append(metric)
    return markdown_table([_HEAD, *(_row(same) for same in rows.values())])


def _row(same: Sequence[Metric]) -> tuple[str, ...]:
    """Return the line of metrics that share a definition."""
    first = same[0]
    needs = [*(["golds"] if first.needs_gold else []), *(["members"] if first.needs_members else [])]
    return (
        f"`{_common([metric.name for metric in same])}`{' †' if first.in_table else ''}",
        first.definition,
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
