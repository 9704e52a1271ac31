"""All documents: from the values that were logged to the numbers of a task and of a group of tasks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean
from lm_eval.config.group import AggMetricConfig

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.normalised import add_twins, pooled_twin, twin_aggregations
from lm_eval_lora_ensemble.harness.state import ScoredDocument, has_reported, state_of
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import METRICS

_LOGGED_ONLY = ("golds", "lengths", "fold", "other_class")

RawMetrics = MutableMapping[tuple[str, str], list[Any]]
"""lm-eval's values of all documents, by (metric, filter)."""


# ---------------------------------------------------------------------------------------------- a task


def set_documents_aside(task: Any, raw_metrics: RawMetrics) -> None:
    """Give metrics of all documents the documents, and take out what is logged but no metric.

    lm-eval aggregates, and shows, every key that a document logged: without this its table would have rows
    for the gold answers.
    """
    if not has_reported(task):
        return
    state = state_of(task)
    for filter_key in [key for metric, key in raw_metrics if metric == "members"]:
        golds, lengths, folds, _ = (raw_metrics.pop((name, filter_key)) for name in _LOGGED_ONLY)
        members = raw_metrics["members", filter_key]
        state.documents = [
            ScoredDocument(*values) for values in zip(members, golds, lengths, folds, strict=True)
        ]
        for shown, name in state.reported.items():
            if not METRICS[name].per_document:
                raw_metrics[shown, filter_key] = _usable(state.documents, name)
        add_twins(task, raw_metrics, filter_key)


def aggregations(task: Any) -> dict[str, Callable[..., Any]]:
    """Return how lm-eval aggregates each of our metrics over the task's documents."""
    found: dict[str, Callable[..., Any]] = {"members": _number_of_members}
    for shown, name in state_of(task).reported.items():
        found[shown] = mean if METRICS[name].per_document else functools.partial(_of_task, task, name)
    return {**found, **twin_aggregations(task)}


def directions(task: Any) -> dict[str, bool]:
    """Return whether higher is better, for those of our metrics of which either is."""
    shown_as = {**state_of(task).reported, **state_of(task).twins}
    meanings = {shown: METRICS[name].direction for shown, name in shown_as.items()}
    return {shown: direction == "higher" for shown, direction in meanings.items() if direction}


def _number_of_members(items: Sequence[Sequence[Sequence[float]]]) -> int:
    """Return N, which every document of a run shares."""
    sizes = {len(item) for item in items}
    if len(sizes) != 1:
        raise EnsembleError(
            f"documents scored by different numbers of members ({sorted(sizes)}) in one run; "
            "if --use_cache is on, the cache belongs to another ensemble: name a new one"
        )
    return sizes.pop()


def _of_task(task: Any, name: str, documents: Sequence[ScoredDocument]) -> float:
    state = state_of(task)
    return _value(name, _predictions(documents, name, other_class=state.other_class), state.bins)


def _value(name: str, predictions: Predictions, bins: int) -> float:
    return float(Battery(predictions, bins, [name])(np.ones((1, predictions.n_documents)))[name][0])


def _usable(documents: Sequence[ScoredDocument], name: str) -> list[ScoredDocument]:
    """Return the documents that a metric is defined for."""
    return [one for one in documents if one.golds or not METRICS[name].needs_gold]


def _predictions(documents: Sequence[ScoredDocument], name: str, *, other_class: bool) -> Predictions:
    """Pad the documents to one array."""
    counts = [len(one.members[0]) for one in documents]
    scores = np.full((len(documents[0].members), len(counts), max(counts)), -np.inf)
    for d, one in enumerate(documents):
        scores[:, d, : counts[d]] = one.members
    is_gold = np.zeros(scores.shape[1:], dtype=np.bool_)
    for d, one in enumerate(documents):
        is_gold[d, list(one.golds)] = True
    golds = is_gold if METRICS[name].needs_gold else None
    return Predictions.from_scores(scores, golds, counts=counts, other_class=other_class)


# --------------------------------------------------------------------------------------------- a group


def extend_group(
    aggregate: Callable[[Any, Any], dict[str, Any]], group: Any, task_metrics: dict[str, Any]
) -> dict[str, Any]:
    """Aggregate a group with our metrics added: means weighted by documents, others pooled over them.

    Averaging the tasks' calibration errors instead would hide over- and under-confidence that cancel in
    the pool and is biased upwards by small tasks; it is reported beside, as ``ece_macro``.
    """
    tasks = [task for task in group.get_all_tasks() if has_reported(task) and state_of(task).documents]
    if not tasks or not group.aggregate_metric_list:
        return aggregate(group, task_metrics)
    ours = _ours_alone(group, tasks, task_metrics)
    pooled = [shown for shown, name in ours.items() if not METRICS[name].per_document]
    listed = {entry.metric for entry in group.aggregate_metric_list}
    extended = copy.copy(group)
    extended.aggregate_metric_list = [
        *(entry for entry in group.aggregate_metric_list if entry.metric not in pooled),
        *(AggMetricConfig(metric=shown) for shown in ours if shown not in pooled and shown not in listed),
    ]
    row = aggregate(extended, task_metrics)
    for shown in pooled:
        those = [task for task in tasks if shown in _shown(task)]
        twin = shown in state_of(those[0]).twins
        row[f"{shown},none"] = (pooled_twin if twin else _of_tasks)(ours[shown], those)
        row[f"{shown}_macro,none"] = float(
            np.mean([task_metrics[task.task_name][f"{shown},none"] for task in those])
        )
        row[f"{shown}_stderr,none"] = row[f"{shown}_macro_stderr,none"] = "N/A"
    sizes = {task_metrics[task.task_name]["members,none"] for task in tasks}
    if len(sizes) == 1:
        row["members,none"] = sizes.pop()
        row["members_stderr,none"] = "N/A"
    return row


def _ours_alone(group: Any, tasks: Sequence[Any], task_metrics: dict[str, Any]) -> dict[str, str]:
    """Return what some tasks report of ours and no other task reports under the same name."""
    ours = {shown: name for task in tasks for shown, name in _shown(task).items()}
    for task in group.get_all_tasks():
        reported = _shown(task) if has_reported(task) else {}
        for key in task_metrics.get(task.task_name, {}):
            shown = key.partition(",")[0]
            if shown not in reported:
                ours.pop(shown, None)
    return ours


def _shown(task: Any) -> dict[str, str]:
    """Return a task's metrics and their length-normalised twins by their names in the table."""
    return {**state_of(task).reported, **state_of(task).twins}


def _of_tasks(name: str, tasks: Sequence[Any]) -> float:
    """Return a metric over the documents of several tasks, pooled."""
    parts = [
        _predictions(_usable(state_of(task).documents, name), name, other_class=state_of(task).other_class)
        for task in tasks
    ]
    return _value(name, Predictions.concatenate(parts), max(state_of(task).bins for task in tasks))
