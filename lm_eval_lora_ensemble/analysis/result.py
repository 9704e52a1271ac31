"""What an evaluation of saved samples gives back: typed, and as strict JSON."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.analysis.answers import AnswerResult
from lm_eval_lora_ensemble.analysis.strings import StringResult
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate, ResamplingPlan
from lm_eval_lora_ensemble.metrics.calibration import DEFAULT_BINS, ReliabilityBin
from lm_eval_lora_ensemble.metrics.detection import Detection
from lm_eval_lora_ensemble.metrics.ensemble_size import SizeMetrics
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import METRICS


@dataclass(frozen=True)
class Settings:
    """What was chosen, so that a result can be had again.

    Attributes:
        bins: of every binned calibration error.
        resamples: R of every interval.
        seed: of resampling and splitting.
        level: two-sided coverage of the intervals.
        alpha: error rate of the conformal sets.

    Raises:
        EnsembleError: a seed below 0.
    """

    bins: int = DEFAULT_BINS
    resamples: int = 1000
    seed: int = 0
    level: float = 0.95
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.seed < 0:  # a task's plan adds its name's checksum, so that it would not see it
            raise EnsembleError(f"seed is {self.seed}; a whole number of at least 0 is needed")

    def plan(self, name: str, predictions: Predictions, *, resamples: int | None = None) -> ResamplingPlan:
        """Return how a task's documents, or a group's tasks, are resampled; names draw independently of each other."""
        return ResamplingPlan(
            predictions.n_documents,
            resamples or self.resamples,
            self.seed + zlib.crc32(name.encode()),
            clusters=predictions.clusters,
            level=self.level,
        )


@dataclass(frozen=True)
class MetricResult:
    """One metric of one task.

    Attributes:
        ensemble: the ensemble's.
        members: each member's on its own.
        member_mean: their mean.
        difference: ensemble minus member_mean, paired over the same resamples.
        macro: for groups, the unweighted mean of the ensemble's values over tasks; ``ensemble`` is over
            documents pooled. Subjects in which the metric is undefined are left out and counted.
        macro_tasks: tasks in the macro mean.
    """

    ensemble: Estimate
    members: tuple[float, ...]
    member_mean: Estimate
    difference: Estimate
    macro: Estimate | None = None
    macro_tasks: int = 0


@dataclass(frozen=True)
class ConformalResult:
    """Conformal sets calibrated on some of the documents and tested on others.

    Attributes:
        method: ``thr``, ``aps`` or ``raps``.
        alpha: the error rate asked for.
        threshold: calibrated.
        n_calibration, n_test: documents of each part: random halves, or thirds where a scale takes the third.
        coverage, mean_size: on the test documents.
        n_scale: documents that the scale was fitted on for these sets; 0 where it does not come from this task.
        temperature: fitted on them; NaN without.
    """

    method: str
    alpha: float
    threshold: float
    n_calibration: int
    n_test: int
    coverage: Estimate
    mean_size: Estimate
    n_scale: int = 0
    temperature: float = math.nan


@dataclass(frozen=True)
class TaskResult:
    """Everything about one task, or about one group with its documents pooled.

    Attributes:
        documents: D.
        choices: fewest and most choices of a document.
        tasks: the tasks pooled; one for a plain task.
        clustered: whether whole tasks were resampled, as for groups.
        metrics: by name, see :data:`~lm_eval_lora_ensemble.metrics.registry.METRICS`.
        reliability: the reliability table of the ensemble.
        risk_coverage: (coverage, risk) pairs by 1 − max p̄, thinned to a hundred.
        conformal: sets by each method.
        by_size: ensembles of k = 1 … N members.
    """

    documents: int
    choices: tuple[int, int]
    tasks: tuple[str, ...]
    clustered: bool
    metrics: dict[str, MetricResult]
    reliability: list[ReliabilityBin]
    risk_coverage: list[tuple[float, float]]
    conformal: list[ConformalResult]
    by_size: list[SizeMetrics]


@dataclass(frozen=True)
class RecalibrationResult:
    """One task after temperature scaling fitted on another.

    Attributes:
        order: see :func:`~lm_eval_lora_ensemble.metrics.recalibration.recalibrate`.
        fitted_on: the task the temperatures come from.
        temperatures: one for the pool or shared, or one for each member.
        at_limit: a temperature ended at its limit; the fit task says nothing about calibration then.
        metrics: after scaling.
        change: after minus before, for the ensemble, paired.
    """

    order: str
    fitted_on: str
    temperatures: tuple[float, ...]
    at_limit: bool
    metrics: dict[str, Estimate]
    change: dict[str, Estimate]


@dataclass(frozen=True)
class UncertaintyResult:
    """What :func:`evaluate` found.

    Attributes:
        source: where the samples came from.
        model: the run's model and arguments, as far as lm-eval recorded them.
        members: N.
        settings: bins, resamples, seed, level, alpha.
        tasks: by task or group name.
        detection: by in-domain task, out-of-domain task and score.
        recalibration: by task.
        skipped: why a task or group is left out.
        strings: tasks of whole strings.
        answers: tasks of generated texts, by task and lm-eval's filter.
        answer_detection: of those, by in-domain task, out-of-domain task and score.
    """

    source: str
    model: dict[str, Any]
    members: int
    settings: Settings
    tasks: dict[str, TaskResult]
    detection: dict[str, dict[str, dict[str, Detection]]]
    recalibration: dict[str, list[RecalibrationResult]]
    skipped: dict[str, str]
    strings: dict[str, StringResult] = field(default_factory=dict)
    answers: dict[str, dict[str, AnswerResult]] = field(default_factory=dict)
    answer_detection: dict[str, dict[str, dict[str, Detection]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; NaN becomes null, infinities the strings "inf" and "-inf"."""
        return {"metrics": {name: metric.meaning for name, metric in METRICS.items()}, **plain(self)}


def plain(value: Any) -> Any:
    """Turn dataclasses, tuples and numpy scalars into what strict JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
