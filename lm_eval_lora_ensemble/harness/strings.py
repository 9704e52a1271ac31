"""Tasks of whole strings (``loglikelihood``, ``loglikelihood_rolling``): from one score a document to the table.

A document logs ``members``, the N members' loglikelihoods, and under each metric the pair (nats, count) of which the
task's value is the ratio of sums. Counts are lm-eval's own, where the task reports a perplexity by them; the number of
tokens travels with the score.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean, mean_stderr

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.document import RENAMED
from lm_eval_lora_ensemble.metrics.strings import STRING_METRICS, Unit, linearised, quantities
from lm_eval_lora_ensemble.scoring.loglikelihood import EnsembleLoglikelihood

OUTPUT_TYPES = ("loglikelihood", "loglikelihood_rolling")

Pair = tuple[float, float | None]
"""Nats of a document, and the number to divide by; None where it is not known."""

# lm-eval logs (loglikelihood, count) under these
_COUNTED_BY: dict[Unit, tuple[str, ...]] = {
    "byte": ("byte_perplexity", "bits_per_byte"),
    "word": ("word_perplexity",),
}

logger = logging.getLogger(__name__)


@dataclass
class StringState:
    """What a task of whole strings reported.

    Attributes:
        reported: by the name in lm-eval's table, the name in ``STRING_METRICS``; empty until the task reports any.
        pairs: of all documents by the name in the table, once lm-eval aggregates.
    """

    reported: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, Sequence[Pair]] = field(default_factory=dict)


def _state_of(task: Any) -> StringState:
    if "_string_uncertainty" not in vars(task):
        task._string_uncertainty = StringState()
    state: StringState = task._string_uncertainty
    return state


# ------------------------------------------------------------------------------------------ a document


def extended(task: Any, results: Sequence[Any], stock: dict[str, Any]) -> dict[str, Any]:
    """Return the stock metrics of one document with ours, and the members' scores, added.

    A document that is scored by several requests is left as it is: which of them the task is about, only it knows.
    """
    if "bypass" in task._metric_fn_list:
        return stock
    if len(results) != 1:
        _warn_once(
            task.config.task, "scores several strings a document: uncertainty metrics are left out for it"
        )
        return stock
    value = results[0][0] if isinstance(results[0], (tuple, list)) else results[0]
    carries = isinstance(value, EnsembleLoglikelihood)
    members = value.members if carries else np.array([float(value)])
    counts: dict[Unit, float | None] = {
        "token": value.tokens if carries else None,
        **{unit: _count(stock, names) for unit, names in _COUNTED_BY.items()},
    }
    state = _state_of(task)
    if not state.reported:
        state.reported = _names_in_table(task, stock, counts)
    found = {name: float(nats[0]) for name, nats in quantities(members[:, None]).items()}
    ours: dict[str, Pair] = {}
    for shown, name in state.reported.items():
        metric = STRING_METRICS[name]
        ours[shown] = (found[metric.quantity], counts[metric.unit])
    return {**stock, "members": members.tolist(), **ours}


def _count(stock: dict[str, Any], names: Sequence[str]) -> float | None:
    """Return what lm-eval divides the document's loglikelihood by under one of ``names``."""
    pairs = (stock[name] for name in names if name in stock)
    return next((pair[1] for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2), None)


def _names_in_table(task: Any, stock: dict[str, Any], counts: dict[Unit, float | None]) -> dict[str, str]:
    """Choose the task's metrics: by tokens always, by bytes and words where the task itself counts them."""
    wanted = [
        name
        for name, metric in STRING_METRICS.items()
        if metric.unit == "token" or counts[metric.unit] is not None
    ]
    theirs = {*stock, *task._metric_fn_list}
    return {f"{RENAMED}{name}" if name in theirs else name: name for name in wanted}


# ---------------------------------------------------------------------------------------------- a task


def set_pairs_aside(task: Any, raw_metrics: MutableMapping[tuple[str, str], list[Any]]) -> None:
    """Replace each metric's pairs by numbers whose mean is the ratio of their sums.

    lm-eval knows the standard error of a mean, and with these numbers it is the ratio's.
    """
    state = _state_of(task) if "_string_uncertainty" in vars(task) else StringState()
    for shown, filter_key in [key for key in raw_metrics if key[0] in state.reported]:
        pairs = raw_metrics[shown, filter_key]
        state.pairs[shown] = pairs
        raw_metrics[shown, filter_key] = _linearised(pairs)
        if STRING_METRICS[state.reported[shown]].unit == "token" and any(count is None for _, count in pairs):
            _warn_once(
                task.config.task,
                "has scores that do not say their number of tokens (another model's, or an older cache's): "
                "values per token are NaN",
            )


def aggregations(task: Any) -> dict[str, Callable[..., Any]]:
    """Return how lm-eval aggregates each of our metrics; none where the task reported none."""
    shown = _reported(task)
    return {"members": _number_of_members, **dict.fromkeys(shown, mean)} if shown else {}


def directions(task: Any) -> dict[str, bool]:
    """Return whether higher is better, for those of our metrics of which either is."""
    meanings = {shown: STRING_METRICS[name].direction for shown, name in _reported(task).items()}
    return {shown: direction == "higher" for shown, direction in meanings.items() if direction}


def _reported(task: Any) -> dict[str, str]:
    return _state_of(task).reported if "_string_uncertainty" in vars(task) else {}


def _linearised(pairs: Sequence[Pair]) -> list[float]:
    values = [value for value, _ in pairs]
    counts = [float("nan") if count is None else count for _, count in pairs]
    return [float(number) for number in linearised(values, counts)]


def _number_of_members(items: Sequence[Sequence[float]]) -> int:
    """Return N, which every document of a run shares."""
    sizes = {len(item) for item in items}
    if len(sizes) != 1:
        raise EnsembleError(
            f"strings scored by different numbers of members ({sorted(sizes)}) in one run; "
            "if --use_cache is on, the cache belongs to another ensemble: name a new one"
        )
    return sizes.pop()


# --------------------------------------------------------------------------------------------- a group


def extend_group(
    aggregate: Callable[[Any, Any], dict[str, Any]], group: Any, task_metrics: dict[str, Any]
) -> dict[str, Any]:
    """Aggregate a group with our metrics added, as ratios of sums over all its documents.

    A metric is left out where a task of the group reports something else under its name.
    """
    row = aggregate(group, task_metrics)
    tasks = [task for task in group.get_all_tasks() if _reported(task)]
    if not tasks or not group.aggregate_metric_list:
        return row
    shown_by_all = set.intersection(*(set(_state_of(task).pairs) for task in tasks))
    for shown in sorted(shown_by_all - _of_others(group, tasks, task_metrics)):
        numbers = _linearised([pair for task in tasks for pair in _state_of(task).pairs[shown]])
        asked = all(task_metrics[task.task_name][f"{shown}_stderr,none"] != "N/A" for task in tasks)
        row[f"{shown},none"] = mean(numbers)
        row[f"{shown}_stderr,none"] = mean_stderr(numbers) if asked and len(numbers) > 1 else "N/A"
    sizes = {task_metrics[task.task_name]["members,none"] for task in tasks}
    if len(sizes) == 1 and "members,none" not in row:
        row["members,none"] = sizes.pop()
        row["members_stderr,none"] = "N/A"
    return row


def _of_others(group: Any, tasks: Sequence[Any], task_metrics: dict[str, Any]) -> set[str]:
    """Return the names under which the group's tasks of other kinds report."""
    others = (task for task in group.get_all_tasks() if task not in tasks)
    return {key.partition(",")[0] for task in others for key in task_metrics.get(task.task_name, {})}


@functools.cache
def _warn_once(task: str, what: str) -> None:
    logger.warning("task %s %s", task, what)
