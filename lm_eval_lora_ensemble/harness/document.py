"""One document: from its requests' results to the values that lm-eval logs and aggregates."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import handle_non_serializable, hash_string

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.golds import KNOWN_SCORERS, gold_indices
from lm_eval_lora_ensemble.harness.state import is_twin, state_of
from lm_eval_lora_ensemble.metrics.crossfit import fold_of
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
    golds: Collection[int],
    *,
    other_class: bool = False,
    metrics: Collection[str] | None = None,
) -> dict[str, Any]:
    """Compute the values of one document from the members' loglikelihoods.

    Args:
        loglikelihoods: float64 [N, C], each member's loglikelihood of each choice, in nats.
        golds: indices of the right choices; none leaves out the metrics that need them.
        other_class: the choices are single tokens of one vocabulary; add the class of all other tokens.
        metrics: names in the registry; those of lm-eval's table if left out.

    Returns:
        By metric name: a float for a metric that is a mean over documents; for one of all documents the pair
        (confidence, outcome), with outcome None where there is no gold.

    Raises:
        EnsembleError: a score is not finite, or gold is outside the choices.
    """
    outside = [gold for gold in golds if gold not in range(loglikelihoods.shape[1])]
    if outside:
        raise EnsembleError(f"gold is {outside[0]}; there are choices 0 to {loglikelihoods.shape[1] - 1}")
    is_gold = np.isin(np.arange(loglikelihoods.shape[1]), list(golds))
    predictions = Predictions.from_scores(
        loglikelihoods[:, None, :], is_gold[None] if len(golds) else None, other_class=other_class
    )
    outcome = float(predictions.correct[0]) if len(golds) else None
    pair = (float(predictions.confidence[0]), outcome)
    values: dict[str, Any] = {}
    for name in table_metrics() if metrics is None else metrics:
        metric = METRICS[name]
        if metric.needs_gold and not len(golds):
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
        golds,
        other_class=state.other_class,
        metrics=state.reported.values(),
    )
    return {
        **stock,
        "members": members.tolist(),
        "golds": golds,
        "other_class": state.other_class,
        "lengths": _lengths(task, doc, values),
        "fold": fold_of(document_hash(doc)),
        **{shown: ours[name] for shown, name in state.reported.items() if name in ours},
    }


def _lengths(task: Any, doc: dict[str, Any], values: Sequence[Any]) -> dict[str, list[int]]:
    """Return the choices' lengths: as lm-eval's acc_norm and acc_bytes count them, and in tokens if known."""
    if task.multiple_input or task.config.doc_to_choice is None:
        return {}
    texts = [str(choice) for choice in task.doc_to_choice(doc)]
    lengths: dict[str, list[int]] = {
        "chars": [len(text) for text in texts],
        "bytes": [len(text.encode()) for text in texts],
    }
    tokens = [n for n in (getattr(value, "tokens", None) for value in values) if n is not None]
    return {**lengths, "tokens": tokens} if len(tokens) == len(values) else lengths


def document_hash(doc: dict[str, Any]) -> str:
    """Return the hash under which lm-eval logs a document."""
    return str(hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)))


def _golds(task: Any, doc: dict[str, Any], n_choices: int) -> list[int]:
    """Return the indices of the right choices; none where the task has a scoring of its own."""
    known = _known_scorer(task)
    if known is None and _scores_itself(task):
        return []
    texts = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else [""] * n_choices
    try:
        return known(doc) if known else list(gold_indices(task, doc, texts))
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


def _known_scorer(task: Any) -> Callable[[Any], list[int]] | None:
    """Return what finds the gold choices of a task with a scoring of its own, for those that are known."""
    return KNOWN_SCORERS.get(getattr(task.config.process_results, "__name__", ""))


def _names_in_table(task: Any, stock: dict[str, Any]) -> dict[str, str]:
    """Choose the task's metrics, by their names in lm-eval's table; the same on every rank, whatever its documents.

    What the task reports itself keeps its name.
    """
    wanted = [*table_metrics(), *(name for name in state_of(task).metrics if not is_twin(name))]
    own = _scores_itself(task) and not _known_scorer(task)
    why = "scores answers by a rule of its own" if own else ""
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
