"""Selective prediction: does the uncertainty tell which answers are wrong?

A metric that ranks documents is registered once for each score it can rank them by.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from lm_eval_lora_ensemble.metrics import selection
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.battery import WeightedDocuments
from lm_eval_lora_ensemble.metrics.registry import metric

_SCORES = ("max_probability", "entropy", "mutual_information")


class _OfScore(Protocol):
    """A metric of the ranking by a score."""

    __name__: str

    def __call__(self, documents: WeightedDocuments, score: str) -> FloatArray: ...


def _by_each_score(column: str = "", **meaning: Any) -> Callable[[_OfScore], _OfScore]:
    """Register ``{function}_{score}`` for every score; ``column`` heads that of the first one."""

    def register(compute: _OfScore) -> _OfScore:
        for score in _SCORES:
            metric(
                name=f"{compute.__name__}_{score}",
                family="selection",
                needs_members=score == "mutual_information",
                column=column if score == _SCORES[0] else "",
                **meaning,
            )(partial(compute, score=score))
        return compute

    return register


@_by_each_score(
    direction="lower",
    range="0–1",
    column="AURC",
    definition="(1/n) Σ_k error rate among the k most certain documents",
    source="[10], [11]",
)
def aurc(documents: WeightedDocuments, score: str) -> FloatArray:
    """(R,): area under the risk–coverage curve."""
    return selection.area_under_risk_coverage(documents.runs(score))


@_by_each_score(
    direction="lower",
    range="0–1",
    definition="aurc less that of the best possible ranking of the same answers",
    source="[11]",
)
def excess_aurc(documents: WeightedDocuments, score: str) -> FloatArray:
    """(R,): what a better ranking could still gain."""
    return documents[f"aurc_{score}"] - selection.optimal_area(documents.runs(score))


@_by_each_score(
    direction="higher",
    range="0–1, chance ½",
    column="AUROC of errors",
    definition="P(an error scores above a correct answer) + ½ P(equal)",
    source="[9]",
)
def error_auroc(documents: WeightedDocuments, score: str) -> FloatArray:
    """(R,): area under the ROC curve, errors positive."""
    return documents.runs(score).auroc()


@_by_each_score(
    direction="higher",
    range="0–1",
    definition="average precision; chance is the error rate",
    source="[9]",
)
def error_aupr(documents: WeightedDocuments, score: str) -> FloatArray:
    """(R,): area under the precision–recall curve, errors positive."""
    return documents.runs(score).average_precision()


def _accuracy_at(documents: WeightedDocuments, percent: int) -> FloatArray:
    """(R,): accuracy when the least certain are withheld."""
    return selection.accuracy_at(documents.runs("max_probability"), percent / 100)


for _percent in (50, 80, 90):
    metric(
        name=f"accuracy_at_{_percent}_coverage",
        family="selection",
        direction="higher",
        range="0–1",
        definition="accuracy among the ⌈* % · n⌉ documents of highest confidence",
        source="[10]",
    )(partial(_accuracy_at, percent=_percent))


@metric(
    family="selection",
    direction="higher",
    range="0–1",
    definition="largest share that a threshold on confidence accepts with at most 5 % errors",
    source="[10]",
)
def coverage_at_5_risk(documents: WeightedDocuments) -> FloatArray:
    """(R,): what can be answered if one answer in twenty may be wrong."""
    return selection.coverage_at(documents.runs("max_probability"), 0.05)
