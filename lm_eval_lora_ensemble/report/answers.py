"""Generated answers in the report: a row for each run, task, filter and score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_lora_ensemble.analysis.answers import AnswerResult
from lm_eval_lora_ensemble.analysis.evaluation import answer_detections, answer_results
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate
from lm_eval_lora_ensemble.metrics.detection import Detection
from lm_eval_lora_ensemble.report.entries import Entry, is_last_epoch
from lm_eval_lora_ensemble.report.leaderboard import display


@dataclass(frozen=True)
class Answers:
    """What a run's generated answers say of themselves.

    Attributes:
        results: by task and lm-eval's filter.
        detection: by in-domain task, out-of-domain task and score.
    """

    results: Mapping[str, Mapping[str, AnswerResult]]
    detection: Mapping[str, Mapping[str, Mapping[str, Detection]]]


def make_answers(entries: Sequence[Entry], ood: Sequence[str], settings: Settings) -> dict[int, Answers]:
    """Return the answers of every run that has any; of a sweep, in the last epoch."""
    return {
        index: Answers(answer_results(entry.run, settings), answer_detections(entry.run, ood, settings))
        for index, entry in enumerate(entries)
        if entry.run.answers and is_last_epoch(entry, entries)
    }


def answer_rows(answers: Mapping[int, Answers], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the rows of the table of answers as they are shown."""
    return [
        {
            "run": entries[index].label,
            "task": task_name(task, filter_key),
            "n": _counted(result),
            "accuracy": _shown(result.accuracy),
            "ece": _shown(result.ece),
            "score": score,
            "mean": _shown(mean),
            "errors": [
                _shown(getattr(result.errors.get(score), name, None)) for name in ("auroc", "aurc", "prr")
            ],
        }
        for index, of_run in answers.items()
        for task, by_filter in of_run.results.items()
        for filter_key, result in by_filter.items()
        for score, mean in result.means.items()
    ]


def detection_rows(answers: Mapping[int, Answers], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the rows of the table of domains as they are shown."""
    return [
        {
            "run": entries[index].label,
            "inside": inside,
            "outside": outside,
            "score": score,
            "values": [_shown(found.auroc), _shown(found.aupr), _shown(found.fpr95)],
        }
        for index, of_run in answers.items()
        for inside, by_outside in of_run.detection.items()
        for outside, by_score in by_outside.items()
        for score, found in by_score.items()
    ]


def sentences(answers: Mapping[int, Answers], entries: Sequence[Entry]) -> list[str]:
    """Say of each task which score tells its errors best, if any does beyond chance."""
    said = []
    for index, of_run in answers.items():
        for task, by_filter in of_run.results.items():
            for filter_key, result in by_filter.items():
                if result.accuracy is None:
                    continue
                sure = {s: e.auroc for s, e in result.errors.items() if e.auroc.quoted[0] > 0.5}
                where = f"{entries[index].label} on {task_name(task, filter_key)}, {_counted(result)} generated answers"
                accuracy = f"{result.judged_by} {display(result.accuracy.value)}"
                if sure:
                    best = max(sure, key=lambda score: sure[score].value)
                    told = f"errors score higher by {best}, AUROC {_shown(sure[best])}"
                else:
                    told = "no score tells errors from right answers beyond chance"
                said.append(f"{where}: {accuracy}; {told}.")
    return said


def task_name(task: str, filter_key: str) -> str:
    """Return how a task under a filter is called."""
    return task if filter_key == "none" else f"{task}, {filter_key}"


def _counted(result: AnswerResult) -> str:
    """Return how many answers there are, and how many of them only accuracy counts."""
    without = f" ({result.left_out} without a score)" if result.left_out else ""
    return f"{result.documents + result.left_out}{without}"


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    low, high, _ = estimate.quoted
    value = display(estimate.value)
    return value if math.isnan(low) else f"{value} [{display(low)}, {display(high)}]"
