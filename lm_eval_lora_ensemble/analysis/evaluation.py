"""From a run's samples to every metric with its interval: one call, one typed result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.analysis.answers import AnswerResult, detect_answers, evaluate_answers
from lm_eval_lora_ensemble.analysis.conformal_sets import conformal_results
from lm_eval_lora_ensemble.analysis.domains import detect_all, in_domain_tasks
from lm_eval_lora_ensemble.analysis.result import (
    MetricResult,
    RecalibrationResult,
    Settings,
    TaskResult,
    UncertaintyResult,
)
from lm_eval_lora_ensemble.analysis.run import NothingToAnalyseError, Run
from lm_eval_lora_ensemble.analysis.strings import evaluate_strings
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import (
    Bootstrapped,
    Estimate,
    ResamplingPlan,
    bootstrap,
    interval,
    mean_of,
)
from lm_eval_lora_ensemble.metrics.calibration import reliability_table
from lm_eval_lora_ensemble.metrics.detection import Detection
from lm_eval_lora_ensemble.metrics.ensemble_size import by_size
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.recalibration import ORDERS, TemperatureScaling, recalibrate
from lm_eval_lora_ensemble.metrics.registry import METRICS
from lm_eval_lora_ensemble.metrics.selection import risk_coverage

_CURVE_POINTS = 101


def evaluate(
    run: Run,
    *,
    ood: Sequence[str] = (),
    calibrate: str | None = None,
    settings: Settings | None = None,
) -> UncertaintyResult:
    """Compute the whole battery for every task and group of a run.

    Args:
        run: from :func:`~lm_eval_lora_ensemble.analysis.runs.load_runs`.
        ood: tasks or groups that are out-of-domain; every other top-level task is in-domain to them.
        calibrate: the task or group to fit temperatures on; they are applied to every other top-level task.
        settings: bins, resamples, seed, level, alpha.

    Raises:
        NothingToAnalyseError: no task's gold answers are known, and nothing is out-of-domain.
        EnsembleError: a name that the run lacks, no in-domain task left, or unknown gold answers of a task
            that is not out-of-domain only.

    Example:
        >>> from lm_eval_lora_ensemble import evaluate, load_runs
        >>> (run,) = load_runs("results")
        >>> result = evaluate(run, ood=["varies_context"])
        >>> nll = result.tasks["both"].metrics["nll"]
        >>> round(nll.ensemble.value, 2), nll.difference.value < 0
        (16.71, True)
        >>> round(result.detection["both"]["varies_context"]["entropy"].auroc.value, 2)
        0.98
    """
    chosen = settings or Settings()
    if isinstance(ood, str):
        raise EnsembleError(f"ood={ood!r}: give a list of names, [{ood!r}]")
    of_choices = [name for name in ood if name not in run.answers]
    for name in of_choices:
        run.scored_leaves(name)  # raises before the work, not after
    if calibrate:
        run.leaves(calibrate)
    results: dict[str, TaskResult] = {}
    drawn: dict[str, Bootstrapped] = {}
    skipped = {
        name: why for name, why in run.skipped.items() if name not in run.strings and name not in run.answers
    }
    # Tasks before groups: a group's macro value is the mean of its tasks' resamples.
    for name in (*run.tasks, *run.groups):
        predictions = run.predictions(name)
        if predictions.is_gold is None:
            skipped[name] = f"gold answers unknown: {predictions.missing_gold}"
            continue
        results[name], drawn[name] = _evaluate_task(run, name, drawn, chosen)
    if not results and not ood and not run.strings and not run.answers:
        raise NothingToAnalyseError(f"{run.source}: no task has gold answers: {skipped}")

    return UncertaintyResult(
        source=run.source,
        model={key: run.config[key] for key in ("model", "model_args", "lora_ensemble") if key in run.config},
        members=run.n_members,
        settings=chosen,
        tasks={name: results[name] for name in run.names() if name in results},
        detection=detect_all(run, of_choices, chosen),
        recalibration=_recalibrate_all(run, calibrate, chosen) if calibrate else {},
        skipped=skipped,
        strings={
            name: evaluate_strings(
                scores,
                ResamplingPlan(scores.n_documents, chosen.resamples, chosen.seed, level=chosen.level),
            )
            for name, scores in run.strings.items()
        },
        answers=answer_results(run, chosen),
        answer_detection=answer_detections(run, ood, chosen),
    )


def answer_results(run: Run, settings: Settings) -> dict[str, dict[str, AnswerResult]]:
    """Return the results of a run's tasks of generated texts, by task and lm-eval's filter."""
    return {
        name: evaluate_answers(
            scores,
            ResamplingPlan(scores.n_documents, settings.resamples, settings.seed, level=settings.level),
            settings.bins,
        )
        for name, scores in run.answers.items()
        if scores.n_documents
    }


def answer_detections(
    run: Run, ood: Sequence[str], settings: Settings
) -> dict[str, dict[str, dict[str, Detection]]]:
    """Compare each out-of-domain task of generated texts with each other one, as far as a run has both."""
    outside = [name for name in ood if name in run.answers]
    return {
        inside: {
            name: detect_answers(
                run.answers[inside],
                run.answers[name],
                resamples=settings.resamples,
                seed=settings.seed,
                level=settings.level,
            )
            for name in outside
        }
        for inside in run.answers
        if outside and inside not in outside
    }


def _recalibrate_all(run: Run, fitted_on: str, settings: Settings) -> dict[str, list[RecalibrationResult]]:
    """Apply temperatures fitted on one task to every other top-level one with gold answers."""
    calibration = run.predictions(fitted_on)
    tests = {name: run.predictions(name) for name in in_domain_tasks(run, [fitted_on])}
    return {
        name: _recalibrate(name, test, fitted_on, calibration, settings)
        for name, test in tests.items()
        if test.is_gold is not None
    }


def _evaluate_task(
    run: Run, name: str, drawn: Mapping[str, Bootstrapped], settings: Settings
) -> tuple[TaskResult, Bootstrapped]:
    """Return a task's or group's result, and the ensemble's resamples for the groups above it."""
    predictions, leaves = run.predictions(name), run.leaves(name)
    clustered = predictions.clusters is not None
    plan = settings.plan(name, predictions)
    ensemble = bootstrap(Battery(predictions, settings.bins), plan)
    if predictions.n_members == 1:
        members = [ensemble]
    else:
        members = [
            bootstrap(Battery(predictions.member(m), settings.bins), plan)
            for m in range(predictions.n_members)
        ]
    average = mean_of(members)
    difference = ensemble.minus(average)
    parts = [drawn[leaf] for leaf in leaves] if clustered else []
    metrics = {}
    for metric in METRICS:
        macro, count = macro_mean(metric, parts, settings.level) if parts else (None, 0)
        metrics[metric] = MetricResult(
            ensemble=ensemble.estimate(metric),
            members=tuple(member.value[metric] for member in members),
            member_mean=average.estimate(metric),
            difference=difference.estimate(metric),
            macro=macro,
            macro_tasks=count,
        )
    curve = risk_coverage(predictions.least_confidence, ~predictions.correct)
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
        conformal=conformal_results(run, name, settings),
        by_size=by_size(predictions, bins=settings.bins, seed=settings.seed),
    )
    return result, ensemble


def macro_mean(metric: str, parts: Sequence[Bootstrapped], level: float) -> tuple[Estimate, int]:
    """Average a metric over tasks, each resampled on its own; undefined values are left out, in resamples too."""
    values = np.array([part.value[metric] for part in parts])
    defined = ~np.isnan(values)
    if not defined.any():
        nothing = np.full(2, np.nan)
        return interval(float("nan"), nothing, nothing, level), 0
    of_each = [p.resampled[metric] for p, ok in zip(parts, defined, strict=True) if ok]
    fewest = min(map(len, of_each))  # large tasks have fewer
    resampled = np.stack([of_task[:fewest] for of_task in of_each])
    with np.errstate(invalid="ignore", divide="ignore"):
        return interval(
            float(values[defined].mean()),
            _mean_of_defined(resampled),
            _macro_jackknife(metric, parts, defined),
            level,
        ), int(defined.sum())


def _mean_of_defined(values: FloatArray) -> FloatArray:
    """Return the means (R,) over the tasks (T, R) in which a resample defines the metric; NaN where none does."""
    undefined = np.isnan(values)
    means: FloatArray = np.where(undefined, 0.0, values).sum(axis=0) / (~undefined).sum(axis=0)
    return means


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


def _recalibrate(
    name: str, test: Predictions, fitted_on: str, calibration: Predictions, settings: Settings
) -> list[RecalibrationResult]:
    plan = settings.plan(name, test)
    names = [name for name, metric in METRICS.items() if metric.family == "calibration"]
    before = bootstrap(Battery(test, settings.bins, names), plan)
    results = []
    for order in ORDERS:
        fitted = recalibrate(calibration, test, order)
        after = bootstrap(Battery(fitted.predictions, settings.bins, names), plan)
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
