"""One document: from its requests' results to the values that lm-eval logs and aggregates."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from lm_eval.api.task import ConfigurableTask

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.golds import gold_indices
from lm_eval_lora_ensemble.harness.state import state_of
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import METRICS
from lm_eval_lora_ensemble.scoring.loglikelihood import EnsembleLoglikelihood

logger = logging.getLogger(__name__)

ADDS_TO_STOCK = "adds_to_stock_results"
"""A class attribute that says: this class's process_results adds to the one it inherits."""

RENAMED = "ensemble_"
"""Before the name of a metric of ours whose own name the task reports something else under."""


def document_metrics(
    loglikelihoods: npt.NDArray[np.float64],
    gold: int | None,
    *,
    other_class: bool = False,
    metrics: Collection[str] | None = None,
) -> dict[str, Any]:
    """Compute the values of one document from the members' loglikelihoods.

    Args:
        loglikelihoods: float64 [N, C], each member's loglikelihood of each choice, in nats.
        gold: index of the right choice; None leaves out the metrics that need it.
        other_class: the choices are single tokens of one vocabulary; add the class of all other tokens.
        metrics: names in the registry; those of lm-eval's table if left out.

    Returns:
        By metric name: a float for a metric that is a mean over documents; for one of all documents the pair
        (confidence, outcome), with outcome None where gold is.

    Raises:
        EnsembleError: a score is not finite, or gold is outside the choices.
    """
    predictions = Predictions.from_scores(
        loglikelihoods[:, None, :], None if gold is None else [gold], other_class=other_class
    )
    outcome = None if gold is None else float(predictions.correct[0])
    pair = (float(predictions.confidence[0]), outcome)
    values: dict[str, Any] = {}
    for name in table_metrics() if metrics is None else metrics:
        metric = METRICS[name]
        if metric.needs_gold and gold is None:
            continue
        if not metric.per_document:
            values[name] = pair
        elif metric.needs_members and predictions.n_members == 1:
            values[name] = float("nan")
        else:
            values[name] = float(metric.compute(predictions)[0])
    return values


def table_metrics() -> list[str]:
    """Return the metrics of lm-eval's table that need not be asked for."""
    return [metric.name for metric in METRICS.values() if metric.in_table]


def extended(task: Any, doc: dict[str, Any], results: Sequence[Any], stock: dict[str, Any]) -> dict[str, Any]:
    """Return the stock metrics of one document with ours, and what they were made from, added."""
    if task.OUTPUT_TYPE != "multiple_choice" or "bypass" in task._metric_fn_list:
        return stock
    n_choices = len(task.doc_to_choice(doc)) if task.config.doc_to_choice is not None else len(results)
    if len(results) < n_choices:
        _warn_once(
            task.config.task,
            "scores other requests than its choices: uncertainty metrics are left out for it",
        )
        return stock
    state = state_of(task)
    if not state.reported:
        state.reported = _names_in_table(task, stock)
    values = [value for value, _ in results[:n_choices]]
    rows = [value.members if isinstance(value, EnsembleLoglikelihood) else [float(value)] for value in values]
    members = np.array(rows).T
    golds = _golds(task, doc, n_choices)
    ours = document_metrics(
        members,
        golds[0] if len(golds) == 1 else None,
        other_class=state.other_class,
        metrics=state.reported.values(),
    )
    return {
        **stock,
        "members": members.tolist(),
        "golds": golds,
        "other_class": state.other_class,
        **{shown: ours[name] for shown, name in state.reported.items() if name in ours},
    }


def _golds(task: Any, doc: dict[str, Any], n_choices: int) -> list[int]:
    """Return the indices of the right choices; none where the task has a scoring of its own."""
    if _scores_itself(task):
        return []
    texts = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else [""] * n_choices
    try:
        return list(gold_indices(task, doc, texts))
    except LookupError as error:
        raise EnsembleError(
            f"task {task.config.task}: {error}; fix doc_to_target, or run with uncertainty_metrics=False"
        ) from error


def _scores_itself(task: Any) -> bool:
    """Whether the task has a scoring of its own, whose gold answers need not be what doc_to_target gives."""
    if callable(task.config.process_results):
        return True
    defining = (cls for cls in type(task).__mro__ if "process_results" in vars(cls))
    return next(cls for cls in defining if not vars(cls).get(ADDS_TO_STOCK)) is not ConfigurableTask


def _names_in_table(task: Any, stock: dict[str, Any]) -> dict[str, str]:
    """Choose the task's metrics, by their names in lm-eval's table; the same on every rank, whatever its documents.

    What the task reports itself keeps its name.
    """
    wanted = [*table_metrics(), *state_of(task).metrics]
    why = "scores answers by a rule of its own" if _scores_itself(task) else ""
    why = why or ("has several gold answers" if task.multiple_target else "")
    if why:
        _warn_once(task.config.task, f"{why}: metrics that need the gold answer are left out for it")
        wanted = [name for name in wanted if not METRICS[name].needs_gold]
    theirs = {*stock, *task._metric_fn_list}
    for name in sorted(theirs.intersection(wanted)):
        _warn_once(task.config.task, f"reports a {name} of its own: ours is called {RENAMED}{name} there")
    return {f"{RENAMED}{name}" if name in theirs else name: name for name in wanted}


@functools.cache
def _warn_once(task: str, what: str) -> None:
    logger.warning("task %s %s", task, what)
