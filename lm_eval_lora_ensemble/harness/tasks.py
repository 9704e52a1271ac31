"""The lm-eval side of the metrics: from a task's results to the numbers in its table, and nothing more.

Two ways lead here. :class:`UncertaintyTask` is what our task YAMLs are made of; it reports the metrics for
every lm-eval model, a single model being an ensemble of one. :func:`extend_tasks` lets stock multiple-choice
tasks report them too, for results that carry members' scores; any other model's results carry none, so its
runs do not change.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import numpy.typing as npt
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics import choices
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.calibration import expected_calibration_error, rms_calibration_error
from lm_eval_lora_ensemble.metrics.information import (
    expected_entropy,
    mutual_information,
    predictive_entropy,
)
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.proper_scores import brier_score, negative_loglikelihood
from lm_eval_lora_ensemble.metrics.registry import METRICS
from lm_eval_lora_ensemble.scoring.loglikelihood import EnsembleLoglikelihood

logger = logging.getLogger(__name__)

DEFAULT_BINS = 15
MEAN_METRICS = ("nll", "brier_score", "predictive_entropy", "expected_entropy", "mutual_information")
CALIBRATION_METRICS: dict[str, Callable[..., float]] = {
    "ece": expected_calibration_error,
    "rms_ce": rms_calibration_error,
}
LOWER_IS_BETTER = ("nll", "brier_score", "ece", "rms_ce")

# (confidence in the predicted choice, whether it is right) of one document
ConfidenceAndOutcome = tuple[float, float]


@dataclass
class UncertaintyState:
    """What a task remembers of its run so that it, and its groups, can aggregate.

    Attributes:
        bins: number of equal-width bins of the calibration metrics.
        other_class: add the paper's class "other" to single-letter choices.
        metrics: further metrics of :data:`.uncertainty.battery.METRICS` to put into the table.
        reported: the task has produced uncertainty metrics in this run.
        outcomes: every document's confidence and outcome, kept when lm-eval aggregates.
        scores: every document's member loglikelihoods, likewise.
    """

    bins: int = DEFAULT_BINS
    other_class: bool = False
    metrics: Sequence[str] = ()
    reported: bool = False
    outcomes: list[ConfidenceAndOutcome] = field(default_factory=list)
    scores: list[list[list[float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                near = get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
                raise EnsembleError(f"uncertainty has no metric {name!r}; the nearest is {near!r}")


def _state(task: Any) -> UncertaintyState:
    if "_uncertainty" not in vars(task):
        task._uncertainty = UncertaintyState()
    state: UncertaintyState = task._uncertainty
    return state


# --------------------------------------------------------------------------------------- one document


def document_metrics(
    loglikelihoods: npt.NDArray[np.float64], gold: int, *, other_class: bool = False
) -> dict[str, Any]:
    """Compute every per-document value from the members' loglikelihoods.

    Args:
        loglikelihoods: float64 [N, C], each member's loglikelihood of each choice, in nats.
        gold: index of the right choice.
        other_class: the choices are single tokens of one vocabulary; add the class of all other tokens.

    Returns:
        By metric name: floats (nats for nll, entropies and mutual information), for ``ece`` and ``rms_ce``
        the pair (confidence, outcome), for ``members`` the loglikelihoods as nested lists.

    Raises:
        EnsembleError: a score is not finite, or gold is outside the choices.
    """
    to_probabilities = choices.with_other_class if other_class else choices.choice_probabilities
    probabilities = to_probabilities(loglikelihoods)
    members = probabilities[:, None, :]  # (N, D=1, C)
    mixture = members.mean(axis=0)
    golds = np.array([gold])
    predicted = int(mixture[0].argmax())
    outcome = (float(mixture[0, predicted]), float(predicted == gold))
    return {
        "nll": float(negative_loglikelihood(mixture, golds)[0]),
        "brier_score": float(brier_score(mixture, golds)[0]),
        "predictive_entropy": float(predictive_entropy(members)[0]),
        "expected_entropy": float(expected_entropy(members)[0]),
        "mutual_information": float(mutual_information(members)[0]),
        "ece": outcome,
        "rms_ce": outcome,
        "members": loglikelihoods.tolist(),
    }


def gold_index(task: Any, doc: dict[str, Any], n_choices: int) -> int | None:
    """Return the index of the right choice as lm-eval's own scoring finds it; None if there are several.

    Raises:
        EnsembleError: the gold answer is not among the choices.
    """
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, (list, tuple)):
        return None
    if isinstance(gold, str):
        texts = task.doc_to_choice(doc)
        gold = texts.index(gold) if gold in texts else -1
    if not 0 <= int(gold) < n_choices:
        raise EnsembleError(
            f"task {task.config.task}: the gold answer {gold!r} of a document is none of its {n_choices} "
            "choices; fix doc_to_target, or run with uncertainty_metrics=False"
        )
    return int(gold)


def _extended(
    task: Any, doc: dict[str, Any], results: Sequence[Any], stock: dict[str, Any]
) -> dict[str, Any]:
    """Return the stock metrics of one document with ours added."""
    if task.OUTPUT_TYPE != "multiple_choice" or "bypass" in task._metric_fn_list:
        return stock
    n_choices = len(task.doc_to_choice(doc)) if task.config.doc_to_choice is not None else len(results)
    gold = gold_index(task, doc, n_choices)
    if gold is None or len(results) < n_choices:
        reason = "has several gold answers" if gold is None else "scores other requests than its choices"
        _warn_once(task.config.task, reason)
        return stock
    state = _state(task)
    state.reported = True
    values = [value for value, _ in results[:n_choices]]
    rows = [value.members if isinstance(value, EnsembleLoglikelihood) else [float(value)] for value in values]
    ours = document_metrics(np.array(rows).T, gold, other_class=state.other_class)
    # a further metric has no value per document; its aggregation needs the gold answer beside `members`
    return {**stock, **ours, **dict.fromkeys(state.metrics, gold)}


@functools.cache
def _warn_once(task: str, reason: str) -> None:
    logger.warning("task %s %s: uncertainty metrics are left out for it", task, reason)


# ------------------------------------------------------------------------------------ a task, a group


def _calibration(task: Any, metric: str, outcomes: Sequence[ConfidenceAndOutcome]) -> float:
    """Aggregate a calibration metric over a task's documents, and keep them for the task's groups."""
    state = _state(task)
    state.outcomes = list(outcomes)
    return _calibration_of(metric, state.outcomes, state.bins)


def _calibration_of(metric: str, outcomes: Sequence[ConfidenceAndOutcome], bins: int) -> float:
    confidence, correct = np.array(outcomes, dtype=np.float64).T
    return CALIBRATION_METRICS[metric](confidence, correct, bins=bins)


def _number_of_members(task: Any, items: Sequence[list[list[float]]]) -> int:
    """Return N, which every document of a run shares, and keep the scores for the further metrics."""
    _state(task).scores = list(items)
    sizes = {len(item) for item in items}
    if len(sizes) != 1:
        raise EnsembleError(
            f"documents scored by different numbers of members ({sorted(sizes)}) in one run; "
            "if --use_cache is on, the cache belongs to another ensemble: name a new one"
        )
    return sizes.pop()


def _further_metric(task: Any, name: str, golds: Sequence[int]) -> float:
    """Compute a metric of the battery over a task's documents; lm-eval aggregates ``members`` before it."""
    state = _state(task)
    counts = [len(scores[0]) for scores in state.scores]
    padded = np.full((len(state.scores[0]), len(counts), max(counts)), -np.inf)
    for document, scores in enumerate(state.scores):
        padded[:, document, : counts[document]] = scores
    predictions = Predictions.from_scores(padded, golds, counts=counts, other_class=state.other_class)
    battery = Battery(predictions, state.bins)
    # some metrics need several members, or both right and wrong answers
    value = battery(np.ones((1, len(counts)))).get(name, [np.nan])
    return float(value[0])


def _aggregations(task: Any) -> dict[str, Callable[..., Any]]:
    calibration = {name: functools.partial(_calibration, task, name) for name in CALIBRATION_METRICS}
    further = {name: functools.partial(_further_metric, task, name) for name in _state(task).metrics}
    members = {"members": functools.partial(_number_of_members, task)}
    return {**dict.fromkeys(MEAN_METRICS, mean), **calibration, **members, **further}


def _extend_group(
    aggregate: Callable[[Any, Any], dict[str, Any]], group: Any, task_metrics: dict[str, Any]
) -> dict[str, Any]:
    """Aggregate a group with our metrics added: means weighted by documents, calibration pooled over them.

    Averaging the tasks' calibration errors instead would hide over- and under-confidence that cancel in
    the pool and is biased upwards by small tasks; it is reported beside, as ``ece_macro``.
    """
    tasks = [task for task in group.get_all_tasks() if getattr(task, "_uncertainty", None)]
    tasks = [task for task in tasks if _state(task).reported and _state(task).outcomes]
    if not tasks or not group.aggregate_metric_list:
        return aggregate(group, task_metrics)
    listed = {entry.metric for entry in group.aggregate_metric_list}
    extended = copy.copy(group)
    extended.aggregate_metric_list = [
        *(entry for entry in group.aggregate_metric_list if entry.metric not in CALIBRATION_METRICS),
        *(AggMetricConfig(metric=name) for name in MEAN_METRICS if name not in listed),
    ]
    row = aggregate(extended, task_metrics)
    outcomes = [pair for task in tasks for pair in _state(task).outcomes]
    bins = max(_state(task).bins for task in tasks)
    for name in CALIBRATION_METRICS:
        row[f"{name},none"] = _calibration_of(name, outcomes, bins)
        values = [task_metrics[task.task_name][f"{name},none"] for task in tasks]
        row[f"{name}_macro,none"] = float(np.mean(values))
        row[f"{name}_stderr,none"] = row[f"{name}_macro_stderr,none"] = "N/A"
    sizes = {task_metrics[task.task_name]["members,none"] for task in tasks}
    if len(sizes) == 1:
        row["members,none"] = sizes.pop()
        row["members_stderr,none"] = "N/A"
    return row


# --------------------------------------------------------------------------------- how tasks get these


def extend_tasks(*, enabled: bool) -> None:
    """Let stock multiple-choice tasks report uncertainty for results that carry members' scores.

    Args:
        enabled: whether the model of the run wants them; asked anew by each ``lora-ensemble`` model.
    """
    _install()
    _Switch.enabled = enabled


def _directions(state: UncertaintyState) -> dict[str, bool]:
    directions = dict.fromkeys(LOWER_IS_BETTER, False)
    for name in state.metrics:
        if METRICS[name].direction:
            directions[name] = METRICS[name].direction == "higher"
    return directions


class _Switch:
    """Whether stock tasks report uncertainty for ensemble results; of the latest ensemble loaded."""

    enabled = False


@functools.cache
def _install() -> None:
    """Wrap four methods of lm-eval, once; each does nothing for results without members."""
    stock_process, stock_aggregation = ConfigurableTask.process_results, ConfigurableTask.aggregation
    stock_direction, stock_group = ConfigurableTask.higher_is_better, Group.aggregate

    @functools.wraps(stock_process)
    def process_results(self: Any, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        stock: dict[str, Any] = stock_process(self, doc, results)
        carries = _Switch.enabled and isinstance(_first_value(results), EnsembleLoglikelihood)
        if isinstance(self, UncertaintyTask) or carries:
            return _extended(self, doc, results, stock)
        return stock

    @functools.wraps(stock_aggregation)
    def aggregation(self: Any) -> dict[str, Any]:
        stock: dict[str, Any] = stock_aggregation(self)
        return {**stock, **_aggregations(self)} if _reported(self) else stock

    @functools.wraps(stock_direction)
    def higher_is_better(self: Any) -> dict[str, Any]:
        stock: dict[str, Any] = stock_direction(self)
        return {**stock, **_directions(_state(self))} if _reported(self) else stock

    @functools.wraps(stock_group)
    def aggregate(self: Any, task_metrics: dict[str, Any]) -> dict[str, Any]:
        return _extend_group(stock_group, self, task_metrics)

    ConfigurableTask.process_results = process_results
    ConfigurableTask.aggregation = aggregation
    ConfigurableTask.higher_is_better = higher_is_better
    Group.aggregate = aggregate


def _first_value(results: Any) -> Any:
    """Return the loglikelihood of a document's first request, or None for other kinds of results."""
    first = results[0] if results else None
    return first[0] if isinstance(first, (tuple, list)) and first else None


def _reported(task: Any) -> bool:
    return "_uncertainty" in vars(task) and _state(task).reported


class UncertaintyTask(ConfigurableTask):
    """A multiple-choice task that reports uncertainty for every model, a plain one being one member.

    In YAML: ``class: !function lm_eval_lora_ensemble.harness.UncertaintyTask``, any key of an lm-eval task,
    and two more:

    * ``stock``: path of a task's YAML below lm-eval's own tasks folder. Its configuration is taken from the
      installed lm-eval, so prompts are the stock task's; other keys override it.
    * ``uncertainty``: ``bins`` (default 15), ``metrics`` (a list of further metrics of the battery, such as
      ``aurc_entropy``; the default table stays short) and ``other_class`` (default false).
    """

    def __init__(self, config: dict[str, Any], **kwargs: Any) -> None:
        _install()
        own = {key: value for key, value in config.items() if key != "class"}
        try:
            state = UncertaintyState(**(own.pop("uncertainty", None) or {}))
        except TypeError as error:
            raise EnsembleError(f"task {own.get('task')}, key uncertainty: {error}") from error
        stock = _stock_config(own.pop("stock")) if "stock" in own else {}
        metadata = {**(stock.get("metadata") or {}), **(own.get("metadata") or {})}
        super().__init__(config={**stock, **own, "metadata": metadata}, **kwargs)
        self._uncertainty = state


def _stock_config(path: str) -> dict[str, Any]:
    """Load a stock task's configuration from the installed lm-eval."""
    file = Path(lm_eval.tasks.__file__).parent / path
    if not file.is_file():
        raise EnsembleError(
            f"this lm-eval has no stock task at {file}; the plugin needs lm-eval 0.4.13 or later"
        )
    config: dict[str, Any] = load_yaml(file, resolve_func=True)
    return {key: value for key, value in config.items() if key not in ("tag", "group", "task_list", "task")}
