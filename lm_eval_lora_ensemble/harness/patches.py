"""Every method and function of lm-eval that is replaced, and nothing else: what the replacements do is handed in.

Each is replaced once, which a mark of our own on its class remembers, whoever wraps the method before or after. For
results that carry no members' scores, and for models that are no ensemble, each does what it did.

| method | why |
|---|---|
| ``TaskManager.__init__`` | lm-eval 0.4.13 has no plugin mechanism for tasks |
| ``ConfigurableTask.process_results``, ``.aggregation``, ``.higher_is_better`` | stock tasks report uncertainty |
| ``Group.aggregate`` | calibration in groups is pooled over documents |
| ``evaluator_utils._collect_results`` | pooled metrics see all documents; what is for samples alone gets no row |
| ``EvaluationTracker.save_results_aggregated``, ``.save_results_samples`` | a run's files appear all together |

Importing this module imports nothing of lm-eval: the start-up file needs the first one alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_MARK = "_lora_ensemble_replaced"


def _replace(
    owner: type | ModuleType, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Replace ``owner.name`` by what ``make`` makes of it, unless that was done before."""
    replaced: set[str] = vars(owner).get(_MARK, set())
    if name in replaced:
        return
    stock = getattr(owner, name)
    setattr(owner, name, functools.wraps(stock)(make(stock)))
    setattr(owner, _MARK, replaced | {name})


def show_tasks_folder(folder: Callable[[], Path]) -> None:
    """Let every ``TaskManager`` with default tasks see ``folder``, after lm-eval's and before the user's own.

    Later folders win, so a user's task of the same name is the one that runs.
    """
    from lm_eval.tasks.manager import TaskManager

    def make(stock: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            # positional order of TaskManager.__init__
            names = ("verbosity", "include_path", "include_defaults", "metadata")
            kwargs.update(zip(names, args, strict=False))
            given = kwargs.get("include_path")
            if kwargs.get("include_defaults", True):
                theirs = given if isinstance(given, (list, tuple)) else [given] if given else []
                kwargs["include_path"] = [folder(), *theirs]
            stock(self, **kwargs)
            self.include_path = given

        return init

    _replace(TaskManager, "__init__", make)


def extend_stock_tasks(
    process_results: Callable[[Any, dict[str, Any], Sequence[Any], dict[str, Any]], dict[str, Any]],
    aggregation: Callable[[Any, dict[str, Any]], dict[str, Any]],
    higher_is_better: Callable[[Any, dict[str, Any]], dict[str, Any]],
) -> None:
    """Let tasks report more than their YAML asks for.

    Args:
        process_results: (task, document, results, stock metrics) to the document's metrics.
        aggregation: (task, stock aggregations) to the task's aggregations.
        higher_is_better: (task, stock directions) to the metrics' directions.
    """
    from lm_eval.api.task import ConfigurableTask

    def results(stock: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        return lambda self, doc, results: process_results(self, doc, results, stock(self, doc, results))

    def own(extend: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> Any:
        return lambda stock: lambda self: extend(self, stock(self))

    _replace(ConfigurableTask, "process_results", results)
    _replace(ConfigurableTask, "aggregation", own(aggregation))
    _replace(ConfigurableTask, "higher_is_better", own(higher_is_better))


def extend_group_rows(
    extend: Callable[[Callable[[Any, Any], dict[str, Any]], Any, dict[str, Any]], dict[str, Any]],
) -> None:
    """Let ``extend`` (stock method, group, the tasks' metrics) make a group's row of the table."""
    from lm_eval.api.group import Group

    _replace(Group, "aggregate", lambda stock: lambda self, task_metrics: extend(stock, self, task_metrics))


def before_aggregation(prepare: Callable[[Any, dict[Any, list[Any]]], None]) -> None:
    """Let ``prepare`` (task, its metrics' items of all documents and ranks) change what lm-eval will aggregate."""
    from lm_eval import evaluator_utils

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def collect_results(accumulated: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            for of_task in accumulated.values():
                prepare(of_task["task"], of_task["raw_metrics"])
            return stock(accumulated, *args, **kwargs)

        return collect_results

    _replace(evaluator_utils, "_collect_results", make)


def save_by(
    save_results: Callable[[Callable[..., None], Callable[..., None], Any, dict[str, Any], Any], None],
    save_samples: Callable[[Callable[..., None], Any, str, list[Any]], None],
) -> None:
    """Let others write a run's files.

    Args:
        save_results: (stock writer of results, stock writer of samples, tracker, results, samples).
        save_samples: (stock writer of samples, tracker, task, samples).
    """
    from lm_eval.loggers import EvaluationTracker

    stock_samples = EvaluationTracker.save_results_samples

    def results(stock: Callable[..., None]) -> Callable[..., None]:
        def save_results_aggregated(self: Any, results: dict[str, Any], samples: Any = None) -> None:
            save_results(stock, stock_samples, self, results, samples)

        return save_results_aggregated

    def samples(stock: Callable[..., None]) -> Callable[..., None]:
        def save_results_samples(self: Any, task_name: str, samples: list[Any]) -> None:
            save_samples(stock, self, task_name, samples)

        return save_results_samples

    _replace(EvaluationTracker, "save_results_aggregated", results)
    _replace(EvaluationTracker, "save_results_samples", samples)
