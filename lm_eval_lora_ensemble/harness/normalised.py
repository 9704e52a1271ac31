"""The twins in lm-eval's table: the same metrics of length-normalised scores, ``nll_norm``, ``ece_norm`` and so on.

A task's own ``acc_norm`` divides loglikelihoods by the choices' characters. Its twins judge the distribution that this
accuracy is about, ``softmax(l / (T · characters))``, with T cross-fitted over five folds of the task's documents, or
fitted on the training task's validation split where the model says so. They are made once lm-eval has all documents.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.state import TEMPERATURE, TWIN, UncertaintyState, is_twin, state_of
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores
from lm_eval_lora_ensemble.metrics.crossfit import crossfit
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import METRICS

logger = logging.getLogger(__name__)

DEFAULT_TWINS = ("nll", "brier_score", "ece", "predictive_entropy", "mutual_information")


def add_twins(task: Any, raw_metrics: MutableMapping[tuple[str, str], list[Any]], filter_key: str) -> None:
    """Add the twins' values of all documents to what lm-eval will aggregate.

    Args:
        task: whose documents have been set aside.
        raw_metrics: lm-eval's values by (metric, filter).
        filter_key: of the task's results.
    """
    state = state_of(task)
    state.twins, state.normalised = {}, None
    if not _wanted(task, state):
        return
    asked = [name for name in _asked(state) if name != TEMPERATURE]
    names = dict.fromkeys([*DEFAULT_TWINS, *(name.removesuffix(TWIN) for name in asked)])
    golds_known = _golds_known(state)
    state.twins = {f"{n}{TWIN}": n for n in names if golds_known or not METRICS[n].needs_gold}
    state.normalised, temperatures = _normalised(task, state)
    for shown, name in state.twins.items():
        raw_metrics[shown, filter_key] = (
            _document_values(state.normalised, name, len(state.documents))
            if METRICS[name].per_document
            else list(state.documents)
        )
    raw_metrics[TEMPERATURE, filter_key] = list(temperatures)


def twin_aggregations(task: Any) -> dict[str, Callable[..., Any]]:
    """Return how lm-eval aggregates each twin: means, whose standard errors are those given T, and pooled values."""
    state = state_of(task)
    if not state.twins:
        return {}
    pooled = {
        shown: functools.partial(_pooled, task, name)
        for shown, name in state.twins.items()
        if not METRICS[name].per_document
    }
    return {**dict.fromkeys(state.twins, mean), **pooled, TEMPERATURE: _geometric_mean}


def pooled_twin(name: str, tasks: Sequence[Any]) -> float:
    """Return a twin over the documents of several tasks, each with its own task's T; NaN where one has none."""
    parts = [state_of(task).normalised for task in tasks]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return float("nan")
    return _value(Predictions.concatenate(known), name, max(state_of(task).bins for task in tasks))


def _wanted(task: Any, state: UncertaintyState) -> bool:
    """Whether the task is judged per length: by what it reports and all its choices, never by a single document."""
    if state.normalise is False:
        return False
    asked = bool(state.normalise) or bool(_asked(state))
    why_not = _no_lengths(task, state)
    if not why_not and not asked:
        longest = max(max(document.lengths["chars"]) for document in state.documents)
        if "acc_norm" not in task._metric_fn_list or longest <= 1:
            return False
    if not why_not and state.scale is None and not _golds_known(state):
        why_not = "its gold answers are unknown, and the scale is fitted to them"
    if why_not and asked:
        logger.warning("task %s: its %s metrics are left out: %s", task.config.task, TWIN, why_not)
    return not why_not


def _no_lengths(task: Any, state: UncertaintyState) -> str:
    """Return why the task's choices have no length to be judged by; empty if they have."""
    if state.other_class:
        return "the class 'other' is defined for sums of single tokens"
    if task.multiple_input or any(not document.lengths for document in state.documents):
        return "its choices are contexts, not continuations"
    return ""


def _asked(state: UncertaintyState) -> list[str]:
    """Return the twins that the task's YAML names."""
    return [name for name in state.metrics if is_twin(name)]


def _golds_known(state: UncertaintyState) -> bool:
    return all(document.golds for document in state.documents)


def _normalised(task: Any, state: UncertaintyState) -> tuple[Predictions | None, FloatArray]:
    """Return the task's length-normalised predictions and each document's T; None and NaN where there is no scale."""
    scores = scores_of(task, state)
    none = np.full(scores.n_documents, np.nan)
    try:
        if state.scale is not None:
            return scores.predictions("chars", state.scale), np.full(scores.n_documents, state.scale)
        fitted = crossfit(scores.per_unit("chars"), scores.folds)
    except EnsembleError as error:
        # not raised: hours of scoring are behind this moment, and every other number of the table stands
        logger.warning("task %s: its %s metrics are NaN: %s", task.config.task, TWIN, error)
        return None, none
    if fitted.undefined:
        logger.warning("task %s: its %s metrics are NaN: %s", task.config.task, TWIN, fitted.undefined)
        return None, none
    if fitted.at_upper_limit:
        logger.warning(
            "task %s: its %s metrics have T at the upper limit: the model is at chance level there",
            task.config.task,
            TWIN,
        )
    return scores.predictions("chars", fitted.temperatures), fitted.temperatures


def scores_of(task: Any, state: UncertaintyState) -> ChoiceScores:
    """Return the documents that were set aside as arrays."""
    documents = state.documents
    counts = np.array([len(document.members[0]) for document in documents])
    width = int(counts.max())
    scores = np.full((len(documents[0].members), len(documents), width), -np.inf)
    is_gold = np.zeros((len(documents), width), dtype=np.bool_)
    # a cache of an earlier release knows no tokens, so that some documents may lack them
    units = set.intersection(*(set(document.lengths) for document in documents))
    lengths = {unit: np.zeros((len(documents), width)) for unit in sorted(units)}
    for d, document in enumerate(documents):
        scores[:, d, : counts[d]] = document.members
        is_gold[d, list(document.golds)] = True
        for unit, padded in lengths.items():
            padded[d, : counts[d]] = document.lengths[unit]
    return ChoiceScores.of(
        scores,
        is_gold if is_gold.any(axis=1).all() else None,
        lengths=lengths,
        counts=counts,
        subject=str(task.config.task),
        folds=[document.fold for document in documents],
        other_class=state.other_class,
    )


def _document_values(predictions: Predictions | None, name: str, documents: int) -> list[float]:
    if predictions is None or (METRICS[name].needs_members and predictions.n_members == 1):
        return [float("nan")] * documents
    values: list[float] = METRICS[name].compute(predictions).tolist()
    return values


def _pooled(task: Any, name: str, _: Sequence[Any]) -> float:
    state = state_of(task)
    return float("nan") if state.normalised is None else _value(state.normalised, name, state.bins)


def _value(predictions: Predictions, name: str, bins: int) -> float:
    return float(Battery(predictions, bins, [name])(np.ones((1, predictions.n_documents)))[name][0])


def _geometric_mean(temperatures: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(temperatures))))
