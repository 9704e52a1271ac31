"""From a run's samples to every metric with its interval: one call, one typed result."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.records import Run
from lm_eval_lora_ensemble.uncertainty import conformal, disagreement
from lm_eval_lora_ensemble.uncertainty.arrays import FloatArray
from lm_eval_lora_ensemble.uncertainty.battery import METRICS, Battery
from lm_eval_lora_ensemble.uncertainty.calibration import DEFAULT_BINS, ReliabilityRow, reliability_table
from lm_eval_lora_ensemble.uncertainty.detection import Detection, detect
from lm_eval_lora_ensemble.uncertainty.intervals import (
    Bootstrapped,
    Estimate,
    Plan,
    bootstrap,
    interval,
    mean_of,
)
from lm_eval_lora_ensemble.uncertainty.predictions import Predictions, check_same_documents
from lm_eval_lora_ensemble.uncertainty.recalibration import ORDERS, TemperatureScaling, recalibrate
from lm_eval_lora_ensemble.uncertainty.selection import risk_coverage
from lm_eval_lora_ensemble.uncertainty.size import SizeRow, by_size

_CURVE_POINTS = 101


@dataclass(frozen=True)
class Settings:
    """What was chosen, so that a result can be had again.

    Attributes:
        bins: of every binned calibration error.
        resamples: R of every interval.
        seed: of resampling and splitting.
        level: two-sided coverage of the intervals.
        alpha: error rate of the conformal sets.
    """

    bins: int = DEFAULT_BINS
    resamples: int = 1000
    seed: int = 0
    level: float = 0.95
    alpha: float = 0.1

    def plan(self, name: str, predictions: Predictions, *, clustered: bool) -> Plan:
        """Return how a task's documents are resampled; tasks draw independently of each other."""
        return Plan(
            predictions.n_documents,
            self.resamples,
            self.seed + zlib.crc32(name.encode()),
            clusters=predictions.subjects if clustered else None,
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
    """Conformal sets calibrated on one random half of the documents and tested on the other."""

    method: str
    alpha: float
    threshold: float
    n_calibration: int
    n_test: int
    coverage: Estimate
    mean_size: Estimate


@dataclass(frozen=True)
class TaskResult:
    """Everything about one task, or about one group with its documents pooled.

    Attributes:
        documents: D.
        choices: fewest and most choices of a document.
        tasks: the tasks pooled; one for a plain task.
        clustered: whether whole tasks were resampled, as for groups.
        metrics: by name, see :data:`~lm_eval_lora_ensemble.uncertainty.battery.METRICS`.
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
    reliability: list[ReliabilityRow]
    risk_coverage: list[tuple[float, float]]
    conformal: list[ConformalResult]
    by_size: list[SizeRow]


@dataclass(frozen=True)
class RecalibrationResult:
    """One task after temperature scaling fitted on another.

    Attributes:
        order: see :func:`~lm_eval_lora_ensemble.uncertainty.recalibration.recalibrate`.
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
    """What :func:`evaluate_uncertainty` found.

    Attributes:
        source: where the samples came from.
        model: the run's model and arguments, as far as lm-eval recorded them.
        members: N.
        settings: bins, resamples, seed, level, alpha.
        tasks: by task or group name.
        detection: by in-domain task, out-of-domain task and score.
        recalibration: by task.
        skipped: why a task or group is left out.
    """

    source: str
    model: dict[str, Any]
    members: int
    settings: Settings
    tasks: dict[str, TaskResult]
    detection: dict[str, dict[str, dict[str, Detection]]]
    recalibration: dict[str, list[RecalibrationResult]]
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; NaN becomes null, infinities the strings "inf" and "-inf"."""
        return {"metrics": {n: dataclasses.asdict(m) for n, m in METRICS.items()}, **plain(self)}


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


def evaluate_uncertainty(
    run: Run,
    *,
    ood: Sequence[str] = (),
    calibrate: str | None = None,
    settings: Settings | None = None,
) -> UncertaintyResult:
    """Compute the whole battery for every task and group of a run.

    Args:
        run: from :func:`~lm_eval_lora_ensemble.records.load_samples`.
        ood: tasks or groups that are out-of-domain; every other top-level task is in-domain to them.
        calibrate: the task or group to fit temperatures on; they are applied to every other top-level task.
        settings: bins, resamples, seed, level, alpha.

    Raises:
        EnsembleError: a name that the run lacks, no in-domain task left, or unknown gold answers of a task
            that is not out-of-domain only.
    """
    chosen = settings or Settings()
    special = {name: set(run.leaves(name)) for name in (*ood, *([calibrate] if calibrate else []))}
    results: dict[str, TaskResult] = {}
    drawn: dict[str, Bootstrapped] = {}
    skipped = dict(run.skipped)
    # Tasks before groups: a group's macro value is the mean of its tasks' resamples.
    for name in (*run.tasks, *run.groups):
        predictions = run.predictions(name)
        if predictions.gold is None:
            skipped[name] = f"gold answers unknown: {predictions.missing_gold}"
            continue
        results[name], drawn[name] = _evaluate_task(name, predictions, run.leaves(name), drawn, chosen)
    if not results and not ood:
        raise EnsembleError(f"{run.source}: no task has gold answers: {skipped}")

    def others(names: Sequence[str]) -> list[str]:
        leaves = set().union(*(special[name] for name in names))
        found = [name for name in run.names() if not leaves & set(run.leaves(name))]
        tops = [n for n in found if not any(set(run.leaves(n)) < set(run.leaves(m)) for m in found)]
        if not tops:
            raise EnsembleError(f"{run.source} has no task besides {', '.join(names)}")
        return tops

    return UncertaintyResult(
        source=run.source,
        model={key: run.config[key] for key in ("model", "model_args", "lora_ensemble") if key in run.config},
        members=run.n_members,
        settings=chosen,
        tasks={name: results[name] for name in run.names() if name in results},
        detection={
            name: {
                out: detect(
                    run.predictions(name),
                    run.predictions(out),
                    resamples=chosen.resamples,
                    seed=chosen.seed,
                    level=chosen.level,
                )
                for out in ood
            }
            for name in (others(list(ood)) if ood else [])
        },
        recalibration={
            name: _recalibrate(name, run.predictions(name), calibrate, run.predictions(calibrate), chosen)
            for name in (others([calibrate]) if calibrate else [])
            if name in results
        }
        if calibrate
        else {},
        skipped=skipped,
    )


def _evaluate_task(
    name: str,
    predictions: Predictions,
    leaves: tuple[str, ...],
    drawn: Mapping[str, Bootstrapped],
    settings: Settings,
) -> tuple[TaskResult, Bootstrapped]:
    """Return a task's or group's result, and the ensemble's resamples for the groups above it."""
    clustered = len(leaves) > 1
    plan = settings.plan(name, predictions, clustered=clustered)
    ensemble = bootstrap(Battery(predictions, settings.bins), plan)
    if predictions.n_members == 1:
        members = [ensemble]
    else:
        members = [
            bootstrap(Battery(predictions.only([m]), settings.bins), plan)
            for m in range(predictions.n_members)
        ]
    average = mean_of(members)
    difference = ensemble.minus(average)
    parts = [drawn[leaf] for leaf in leaves] if clustered else []
    metrics = {}
    for metric in METRICS:
        macro, count = _macro(metric, parts, settings.level) if parts else (None, 0)
        metrics[metric] = MetricResult(
            ensemble=ensemble.estimate(metric),
            members=tuple(member.value[metric] for member in members),
            member_mean=average.estimate(metric),
            difference=difference.estimate(metric),
            macro=macro,
            macro_tasks=count,
        )
    curve = risk_coverage(1.0 - predictions.confidence, ~predictions.correct)
    points = np.unique(np.linspace(0, len(curve.coverage) - 1, _CURVE_POINTS).round().astype(int))
    result = TaskResult(
        documents=predictions.n_documents,
        choices=(int(predictions.counts.min()), int(predictions.counts.max())),
        tasks=leaves,
        clustered=clustered,
        metrics=metrics,
        reliability=reliability_table(
            predictions.confidence, predictions.correct, settings.bins, level=settings.level
        ),
        risk_coverage=[(float(curve.coverage[i]), float(curve.risk[i])) for i in points],
        conformal=_conformal(predictions, settings) if predictions.n_documents > 1 else [],
        by_size=by_size(predictions, bins=settings.bins, seed=settings.seed),
    )
    return result, ensemble


def _macro(metric: str, parts: Sequence[Bootstrapped], level: float) -> tuple[Estimate, int]:
    """Average a metric over tasks, each resampled on its own; undefined values are left out."""
    values = np.array([part.value[metric] for part in parts])
    defined = np.isfinite(values)
    if not defined.any():
        nothing = np.full(2, np.nan)
        return interval(float("nan"), nothing, nothing, level), 0
    resampled = np.stack([p.resampled[metric] for p, ok in zip(parts, defined, strict=True) if ok])
    with np.errstate(invalid="ignore"):
        return interval(
            float(values[defined].mean()),
            resampled.mean(axis=0),
            _macro_jackknife(metric, parts, defined),
            level,
        ), int(defined.sum())


def _macro_jackknife(metric: str, parts: Sequence[Bootstrapped], defined: np.ndarray[Any, Any]) -> FloatArray:
    """Leave one document, or group of documents, out of one task at a time."""
    kept = [part for part, ok in zip(parts, defined, strict=True) if ok]
    # The acceleration of a mean of independent estimates needs their influence values side by side.
    return np.concatenate(
        [
            (p.jackknife[metric] - np.nanmean(p.jackknife[metric])) / len(kept)
            for p in kept
            if len(p.jackknife[metric])
        ]
    )


def _conformal(predictions: Predictions, settings: Settings) -> list[ConformalResult]:
    calibration, test = conformal.split(predictions, 0.5, settings.seed)
    plan = Plan(test.n_documents, settings.resamples, settings.seed, level=settings.level)
    results = []
    for method in conformal.METHODS:
        sets = conformal.conformal_sets(calibration, test, method, settings.alpha, seed=settings.seed)
        values = np.stack([sets.covered.astype(np.float64), sets.sizes], axis=1)

        def means(weights: FloatArray, values: FloatArray = values) -> dict[str, FloatArray]:
            coverage, size = (weights @ values / weights.sum(axis=1, keepdims=True)).T
            return {"coverage": coverage, "size": size}

        drawn = bootstrap(means, plan)
        results.append(
            ConformalResult(
                method,
                settings.alpha,
                sets.threshold,
                sets.n_calibration,
                test.n_documents,
                drawn.estimate("coverage"),
                drawn.estimate("size"),
            )
        )
    return results


def _recalibrate(
    name: str, test: Predictions, fitted_on: str, calibration: Predictions, settings: Settings
) -> list[RecalibrationResult]:
    plan = settings.plan(name, test, clustered=len(np.unique(test.subjects)) > 1)
    families = ("calibration",)
    before = bootstrap(Battery(test, settings.bins, families), plan)
    results = []
    for order in ORDERS:
        fitted = recalibrate(calibration, test, order)
        after = bootstrap(Battery(fitted.predictions, settings.bins, families), plan)
        change = after.minus(before)
        scalings = [s for s in fitted.scalings if isinstance(s, TemperatureScaling)]
        results.append(
            RecalibrationResult(
                order=order,
                fitted_on=fitted_on,
                temperatures=tuple(s.temperature for s in scalings),
                at_limit=any(s.at_limit for s in scalings),
                metrics={n: after.estimate(n) for n in after.value},
                change={n: change.estimate(n) for n in change.value},
            )
        )
    return results


@dataclass(frozen=True)
class Comparison:
    """Run A against run B on the same documents of one task.

    Attributes:
        documents: D.
        difference: A minus B by metric, paired over the same resamples.
        agreement: share of documents for which both predict the same choice.
        total_variation: mean total variation distance of the two distributions, in [0, 1].
    """

    documents: int
    difference: dict[str, Estimate]
    agreement: Estimate
    total_variation: Estimate


def compare_runs(a: Run, b: Run, settings: Settings | None = None) -> dict[str, Comparison]:
    """Compare two runs on the tasks and groups both have.

    Raises:
        EnsembleError: no task in common, or a task with other documents in one run than in the other.
    """
    chosen = settings or Settings()
    names = [name for name in a.names() if name in b.tasks or name in b.groups]
    if not names:
        raise EnsembleError(f"{a.source} and {b.source} have no task in common")
    results = {}
    for name in names:
        first, second = a.predictions(name), b.predictions(name)
        check_same_documents(first, second)
        plan = chosen.plan(name, first, clustered=len(a.leaves(name)) > 1)
        difference = bootstrap(Battery(first, chosen.bins), plan).minus(
            bootstrap(Battery(second, chosen.bins), plan)
        )
        values = np.stack(
            [
                disagreement.agreement(first.mixture, second.mixture),
                disagreement.total_variation(first.mixture, second.mixture),
            ],
            axis=1,
        )

        def means(weights: FloatArray, values: FloatArray = values) -> dict[str, FloatArray]:
            same, distance = (weights @ values / weights.sum(axis=1, keepdims=True)).T
            return {"agreement": same, "total_variation": distance}

        between = bootstrap(means, plan)
        results[name] = Comparison(
            documents=first.n_documents,
            difference={n: difference.estimate(n) for n in difference.value},
            agreement=between.estimate("agreement"),
            total_variation=between.estimate("total_variation"),
        )
    return results
