"""How lm-eval's tasks come to report the metrics.

Two ways lead here. :class:`UncertaintyTask` is what our task YAMLs are made of; it reports the metrics for
every lm-eval model, a single model being an ensemble of one. :func:`extend_tasks` lets stock multiple-choice
tasks report them too, for results that carry members' scores; any other model's results carry none, so its
runs do not change.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval import evaluator_utils
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.aggregation import (
    aggregations,
    directions,
    extend_group,
    set_documents_aside,
)
from lm_eval_lora_ensemble.harness.document import extended
from lm_eval_lora_ensemble.harness.state import UncertaintyState, has_reported
from lm_eval_lora_ensemble.scoring.loglikelihood import EnsembleLoglikelihood


def extend_tasks(*, enabled: bool) -> None:
    """Let stock multiple-choice tasks report uncertainty for results that carry members' scores.

    Args:
        enabled: whether the model of the run wants them; asked anew by each ``lora-ensemble`` model.
    """
    _install()
    _Switch.enabled = enabled


class _Switch:
    """Whether stock tasks report uncertainty for ensemble results; of the latest ensemble loaded."""

    enabled = False


@functools.cache
def _install() -> None:
    """Wrap four methods and a function of lm-eval, once; each does nothing for results without members."""
    stock_collect = evaluator_utils._collect_results
    stock_process, stock_aggregation = ConfigurableTask.process_results, ConfigurableTask.aggregation
    stock_direction, stock_group = ConfigurableTask.higher_is_better, Group.aggregate

    @functools.wraps(stock_process)
    def process_results(self: Any, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        stock: dict[str, Any] = stock_process(self, doc, results)
        carries = _Switch.enabled and isinstance(_first_value(results), EnsembleLoglikelihood)
        if isinstance(self, UncertaintyTask) or carries:
            return extended(self, doc, results, stock)
        return stock

    @functools.wraps(stock_aggregation)
    def aggregation(self: Any) -> dict[str, Any]:
        stock: dict[str, Any] = stock_aggregation(self)
        return {**stock, **aggregations(self)} if has_reported(self) else stock

    @functools.wraps(stock_direction)
    def higher_is_better(self: Any) -> dict[str, Any]:
        stock: dict[str, Any] = stock_direction(self)
        return {**stock, **directions(self)} if has_reported(self) else stock

    @functools.wraps(stock_group)
    def aggregate(self: Any, task_metrics: dict[str, Any]) -> dict[str, Any]:
        return extend_group(stock_group, self, task_metrics)

    @functools.wraps(stock_collect)
    def collect_results(accumulated: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for one in accumulated.values():
            set_documents_aside(one["task"], one["raw_metrics"])
        return stock_collect(accumulated, *args, **kwargs)

    evaluator_utils._collect_results = collect_results
    ConfigurableTask.process_results = process_results
    ConfigurableTask.aggregation = aggregation
    ConfigurableTask.higher_is_better = higher_is_better
    Group.aggregate = aggregate


def _first_value(results: Any) -> Any:
    """Return the loglikelihood of a document's first request, or None for other kinds of results."""
    first = results[0] if results else None
    return first[0] if isinstance(first, (tuple, list)) and first else None


class UncertaintyTask(ConfigurableTask):
    """A multiple-choice task that reports uncertainty for every model, a plain one being one member.

    In YAML: ``class: !function lm_eval_lora_ensemble.harness.UncertaintyTask``, any key of an lm-eval task,
    and two more:

    * ``stock``: path of a task's YAML below lm-eval's own tasks folder. Its configuration is taken from the
      installed lm-eval, so prompts are the stock task's; other keys override it.
    * ``uncertainty``: ``bins`` (default 15), ``metrics`` (a list of further metrics of the registry, such as
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
