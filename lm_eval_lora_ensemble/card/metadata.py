"""What the Hub reads of a card: the metadata above its text, with every result as a model-index entry."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lm_eval_lora_ensemble.card.results import RunResults
from lm_eval_lora_ensemble.card.subject import Subject, dataset_of
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate
from lm_eval_lora_ensemble.report.leaderboard import COLUMNS, Board, Cell

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# the Hub's names for metrics, where it has one; ours elsewhere
_HUB_METRICS = {"acc": "accuracy", "em": "exact_match"}
_DIGITS = 6


def card_data(subject: Subject) -> ModelCardData:
    """Return the metadata of an ensemble's card."""
    from huggingface_hub import ModelCardData

    results = _distinct(
        [entry for of_run in subject.results for entry in eval_results(of_run, subject.level)]
    )
    return ModelCardData(
        **_of_adapters(subject),
        datasets=list(subject.datasets) or None,
        model_name=subject.name,
        eval_results=results,
    )


def member_data(subject: Subject) -> ModelCardData:
    """Return the metadata of a member's card: no results, which are the ensemble's."""
    from huggingface_hub import ModelCardData

    return ModelCardData(**_of_adapters(subject), datasets=list(subject.datasets) or None)


def _of_adapters(subject: Subject) -> dict[str, Any]:
    base = subject.base_model
    known: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    if subject.license:
        known["license"] = subject.license
    return {
        **known,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [*subject.tags, *([f"base_model:adapter:{base}"] if base else [])],
    }


def eval_results(result: RunResults, level: float) -> Iterator[EvalResult]:
    """Yield the ensemble's values of one run, each with its interval among its arguments; undefined ones are left out.

    Args:
        result: of the run.
        level: two-sided coverage of the intervals.
    """
    scale = result.run.distribution.label
    members = result.run.n_members
    for board in result.boards:
        yield from _of_board(result, board, {"level": level, "scale": scale, "members": members})
    shared = {"level": level, "members": members}
    for task, strings in result.strings.items():
        about = _dataset(result, task, (task,), strings.documents)
        for metric, estimate in strings.metrics.items():
            yield from _entry(about, metric, estimate.value, {**_limits(estimate), **shared})
    for task, by_filter in (result.answers.results if result.answers else {}).items():
        for filter_key, answers in by_filter.items():
            asked = answers.documents + answers.left_out
            judged = {answers.judged_by: (answers.accuracy, asked), "ece": (answers.ece, answers.documents)}
            for metric, (known, documents) in judged.items():
                about = _dataset(result, task, (task,), documents)
                if metric and known is not None:
                    yield from _entry(
                        about, metric, known.value, {**_limits(known), **shared, "filter": filter_key}
                    )


def _of_board(result: RunResults, board: Board, shared: Mapping[str, Any]) -> Iterator[EvalResult]:
    (row,) = [row for row in board.rows if row.kind in ("ensemble", "model")]
    mean = next((other for other in board.rows if other.kind == "mean member"), None)
    about = _dataset(result, board.task, board.tasks, row.cells["nll"].n)
    for metric in COLUMNS:
        cell = row.cells[metric]
        resampled = "tasks" if len(board.tasks) > 1 else "documents"
        arguments = {**_limits_of(cell), "resampled": resampled, **shared, "unit": cell.unit}
        if mean is not None and 0 in board.gains:
            gain = board.gains[0][metric]
            arguments |= {
                "mean_member": _number(mean.cells[metric].value),
                "difference": _number(gain.value),
                "difference_low": _number(gain.low),
                "difference_high": _number(gain.high),
            }
        yield from _entry(about, metric, cell.value, arguments)


def _dataset(result: RunResults, task: str, leaves: tuple[str, ...], documents: int) -> dict[str, Any]:
    """Return what an entry says of the task and its data; of a group, what all its tasks have in common."""
    configs = [result.run.task_configs.get(leaf, {}) for leaf in leaves]
    path, config, split = (
        found.pop() if len(found := set(values)) == 1 else None
        for values in (
            map(dataset_of, configs),
            (_text(one.get("dataset_name")) for one in configs),
            (_text(one.get("test_split") or one.get("validation_split")) for one in configs),
        )
    )
    shots = result.shots(task)
    return {
        "task_type": "text-generation",
        "task_name": "Text Generation",
        # the Hub wants a data set's id; a task on files of one's own has none, and is named by itself
        "dataset_type": path or task,
        "dataset_name": result.title(task),
        "dataset_config": config if path else None,
        "dataset_split": split,
        "dataset_args": {
            "task": task,
            "documents": documents,
            **({} if shots is None else {"num_few_shot": shots}),
            **({"tasks_pooled": len(leaves)} if len(leaves) > 1 else {}),
        },
    }


def _entry(
    about: Mapping[str, Any], metric: str, value: float, arguments: Mapping[str, Any]
) -> Iterator[EvalResult]:
    """Yield the entry of a value; JSON, which the Hub makes of it, has no NaN and no infinity."""
    from huggingface_hub import EvalResult

    if not math.isfinite(value):
        return
    known = {key: kept for key, kept in arguments.items() if kept not in (None, "")}
    yield EvalResult(
        **about,
        metric_type=_HUB_METRICS.get(metric, metric),
        metric_name=COLUMNS.get(metric, metric) + _filtered(arguments),
        metric_value=_number(value),
        metric_args={"task": about["dataset_args"]["task"], **known},
    )


def _filtered(arguments: Mapping[str, Any]) -> str:
    filter_key = arguments.get("filter", "none")
    return "" if filter_key == "none" else f", {filter_key}"


def _distinct(results: list[EvalResult]) -> list[EvalResult]:
    """Name the task in the metric's name where tasks share data, whose values the Hub's format joins in one entry."""
    named = {(one.unique_identifier, one.dataset_name) for one in results}
    shared = {identifier for identifier, n in Counter(of for of, _ in named).items() if n > 1}
    return [
        replace(one, metric_name=f"{one.metric_name}, {one.dataset_name}")
        if one.unique_identifier in shared
        else one
        for one in results
    ]


def _limits(estimate: Estimate) -> dict[str, Any]:
    low, high, kind = estimate.quoted
    return {"low": _number(low), "high": _number(high), "interval": "" if math.isnan(low) else kind}


def _limits_of(cell: Cell) -> dict[str, Any]:
    return {"low": _number(cell.low), "high": _number(cell.high), "interval": cell.interval}


def _number(value: float) -> float | None:
    # adding 0 turns a −0 left by rounding into 0
    return round(value, _DIGITS) + 0.0 if math.isfinite(value) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
