"""How lm-eval's tasks come to report the metrics.

Two ways lead here. :class:`UncertaintyTask` is what our task YAMLs are made of; it reports the metrics for
every lm-eval model, a single model being an ensemble of one. :func:`extend_tasks` lets stock tasks of multiple
choice, of whole strings and of generated texts report them too, for results that carry members' scores; any other
model's results carry none, so its runs do not change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness import answers, patches, strings
from lm_eval_lora_ensemble.harness.aggregation import (
    RawMetrics,
    aggregations,
    directions,
    extend_group,
    set_documents_aside,
)
from lm_eval_lora_ensemble.harness.document import extended
from lm_eval_lora_ensemble.harness.state import UncertaintyState, has_reported, state_of
from lm_eval_lora_ensemble.scoring.loglikelihood import EnsembleLoglikelihood


def extend_tasks(*, enabled: bool, scale: float | None = None) -> None:
    """Let stock tasks report uncertainty for results that carry members' scores.

    Args:
        enabled: whether the model that is about to answer wants them.
        scale: T of the length-normalised twins, fitted on a validation split; None cross-fits it on each task.
    """
    _Switch.enabled, _Switch.scale = enabled, scale
    patches.extend_stock_tasks(_stock_results, _with_aggregations, _with_directions)
    _extend_tables()


def _extend_tables() -> None:
    patches.extend_group_rows(_extend_group)
    patches.before_aggregation(_before_aggregation)


def _extend_group(
    aggregate: Callable[[Any, Any], dict[str, Any]], group: Any, task_metrics: dict[str, Any]
) -> dict[str, Any]:
    of_choices = functools.partial(extend_group, aggregate)
    of_strings = functools.partial(strings.extend_group, of_choices)
    return answers.extend_group(of_strings, group, task_metrics)


def _before_aggregation(task: Any, raw_metrics: RawMetrics) -> None:
    set_documents_aside(task, raw_metrics)
    strings.set_pairs_aside(task, raw_metrics)
    answers.set_texts_aside(task, raw_metrics)


class _Switch:
    """Whether stock tasks report uncertainty for ensemble results, and on which scale: what the last to answer asks."""

    enabled = False
    scale: float | None = None


def _stock_results(
    task: Any, doc: dict[str, Any], results: Sequence[Any], stock: dict[str, Any]
) -> dict[str, Any]:
    if isinstance(task, UncertaintyTask):
        return stock  # it extends its own
    if task.OUTPUT_TYPE == answers.OUTPUT_TYPE:
        return answers.extended(task, doc, stock) if _Switch.enabled else stock
    carries = _Switch.enabled and isinstance(_first_value(results), EnsembleLoglikelihood)
    return _extended(task, doc, results, stock) if carries else stock


def _extended(
    task: Any, doc: dict[str, Any], results: Sequence[Any], stock: dict[str, Any]
) -> dict[str, Any]:
    if task.OUTPUT_TYPE == answers.OUTPUT_TYPE:
        return answers.extended(task, doc, stock)
    if task.OUTPUT_TYPE in strings.OUTPUT_TYPES:
        return strings.extended(task, results, stock)
    if isinstance(_first_value(results), EnsembleLoglikelihood):
        state_of(task).scale = _Switch.scale
    return extended(task, doc, results, stock)


def _with_aggregations(task: Any, stock: dict[str, Any]) -> dict[str, Any]:
    if has_reported(task):
        return {**stock, **aggregations(task)}
    return {**stock, **strings.aggregations(task), **answers.aggregations(task)}


def _with_directions(task: Any, stock: dict[str, Any]) -> dict[str, Any]:
    return {**stock, **(directions(task) if has_reported(task) else strings.directions(task))}


def _first_value(results: Any) -> Any:
    """Return the loglikelihood of a document's first request, or whatever else its first result is."""
    first = results[0] if results else None
    return first[0] if isinstance(first, (tuple, list)) and first else first


class UncertaintyTask(ConfigurableTask):
    """A task that reports uncertainty for every model, a plain one being one member: multiple choice or whole strings.

    In YAML: ``class: !function lm_eval_lora_ensemble.harness.UncertaintyTask``, any key of an lm-eval task,
    and two more:

    * ``stock``: path of a task's YAML below lm-eval's own tasks folder. Its configuration is taken from the
      installed lm-eval, so prompts are the stock task's; other keys override it.
    * ``uncertainty``: ``bins`` (default 15), ``metrics`` (a list of further metrics of the registry, such as
      ``aurc_entropy``, or ``rms_ce_norm`` of length-normalised scores; the default table stays short),
      ``normalise`` (true or false: whether the length-normalised twins are reported; left out, a task that reports
      acc_norm of choices longer than a letter has them) and ``other_class`` (default false).
    """

    adds_to_stock_results = True

    def __init__(self, config: dict[str, Any], **kwargs: Any) -> None:
        _extend_tables()
        own = {key: value for key, value in config.items() if key != "class"}
        try:
            state = UncertaintyState(**(own.pop("uncertainty", None) or {}))
        except TypeError as error:
            raise EnsembleError(f"task {own.get('task')}, key uncertainty: {error}") from error
        stock = _stock_config(own.pop("stock")) if "stock" in own else {}
        metadata = {**(stock.get("metadata") or {}), **(own.get("metadata") or {})}
        super().__init__(config={**stock, **own, "metadata": metadata}, **kwargs)
        self._uncertainty = state

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return the stock metrics of one document with ours added, whichever model scored it."""
        return _extended(self, doc, results, super().process_results(doc, results))

    def aggregation(self) -> dict[str, Any]:
        """Return how each metric is aggregated."""
        return _with_aggregations(self, super().aggregation())

    def higher_is_better(self) -> dict[str, Any]:
        """Return each metric's direction."""
        return _with_directions(self, super().higher_is_better())


def _stock_config(path: str) -> dict[str, Any]:
    """Load a stock task's configuration from the installed lm-eval."""
    file = Path(lm_eval.tasks.__file__).parent / path
    if not file.is_file():
        raise EnsembleError(
            f"this lm-eval has no stock task at {file}; the plugin needs lm-eval 0.4.13 or later"
        )
    config: dict[str, Any] = load_yaml(file, resolve_func=True)
    return {key: value for key, value in config.items() if key not in ("tag", "group", "task_list", "task")}
