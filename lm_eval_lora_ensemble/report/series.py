"""The epochs of a sweep side by side: learning, overfitting, and what was kept of the prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lm_eval_lora_ensemble.analysis.comparison import distance_statistics
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import (
    Bootstrapped,
    Estimate,
    ResamplingPlan,
    Statistics,
    bootstrap,
    mean_of,
)
from lm_eval_lora_ensemble.metrics.predictions import Predictions, same_documents
from lm_eval_lora_ensemble.metrics.retention import MEASURES, retention
from lm_eval_lora_ensemble.report.entries import Entry, short_name
from lm_eval_lora_ensemble.report.leaderboard import report_plan

METRICS_BY_EPOCH = ("accuracy", "nll", "ece", "predictive_entropy", "mutual_information")

Estimates = dict[str, Estimate]


@dataclass(frozen=True)
class EpochPoint:
    """One epoch on one task.

    Attributes:
        epoch: 0 is the prior.
        members: N; 1 for the prior.
        ensemble: :data:`METRICS_BY_EPOCH` of all members together.
        single: the same of the mean member.
        retention: :data:`.retention.MEASURES` of the ensemble against the prior; empty without a prior.
        retention_single: the same of the mean member.
    """

    epoch: int
    members: int
    ensemble: Estimates
    single: Estimates
    retention: Estimates = field(default_factory=dict)
    retention_single: Estimates = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """All epochs of one ensemble on one task, ascending.

    Attributes:
        label: the ensemble's name, and its training settings where several series differ in them.
        task: task or group.
        documents: D.
        points: one for each epoch.
        notes: which epochs are left out, and why.
    """

    label: str
    task: str
    documents: int
    points: list[EpochPoint]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Between:
    """Two ensembles at the same epoch on the same documents: agreement and total variation."""

    first: str
    second: str
    task: str
    epochs: tuple[int, ...]
    agreement: tuple[Estimate, ...]
    total_variation: tuple[Estimate, ...]


def make_series(entries: Sequence[Entry], settings: Settings) -> list[Series]:
    """Return a series for every ensemble and top-level task with at least two epochs."""
    labels = series_labels(entries)
    series = []
    for number in sorted(labels):
        runs = sorted((e for e in entries if e.series == number), key=lambda e: e.run.epoch or 0)
        for task in dict.fromkeys(name for e in runs for name in e.run.top_level()):
            by_epoch = {e.run.epoch or 0: e.run.predictions(task) for e in runs if task in e.run}
            known = {epoch: p for epoch, p in by_epoch.items() if p.is_gold is not None}
            if len(known) >= 2:
                series.append(_series(labels[number], task, known, settings))
    return [one for one in series if len(one.points) >= 2]


def series_labels(entries: Sequence[Entry]) -> dict[int, str]:
    """Return the name of every swept ensemble."""
    paths = {e.series: e.run.series for e in entries if e.series is not None}
    names = {number: short_name(path) for number, path in paths.items()}
    if len(set(names.values())) < len(names):
        names = {number: f"{name} ({number + 1})" for number, name in names.items()}
    return names


def _series(label: str, task: str, by_epoch: Mapping[int, Predictions], settings: Settings) -> Series:
    """Return the epochs that answered the same documents as the most others did, the prior's first among equals."""
    alike = [[e for e in by_epoch if same_documents(by_epoch[e], one)] for one in by_epoch.values()]
    epochs = max(alike, key=len)
    others = ", ".join(str(epoch) for epoch in by_epoch if epoch not in epochs)
    plan = report_plan(task, by_epoch[epochs[0]], settings)
    return Series(
        label,
        task,
        by_epoch[epochs[0]].n_documents,
        [_point(e, by_epoch[e], by_epoch[0] if 0 in epochs else None, plan, settings.bins) for e in epochs],
        [f"{label} on {task}: epoch {others} answered other documents and is in no curve"] if others else [],
    )


def _point(
    epoch: int, later: Predictions, prior: Predictions | None, plan: ResamplingPlan, bins: int
) -> EpochPoint:
    def metrics(of: Predictions) -> Statistics:
        return Battery(of, bins, METRICS_BY_EPOCH)

    ensemble, single = _both(later, plan, metrics)
    kept = _both(later, plan, lambda of: retention(prior, of)) if prior is not None else ()
    return EpochPoint(
        epoch,
        later.n_members,
        {name: ensemble.estimate(name) for name in METRICS_BY_EPOCH},
        {name: single.estimate(name) for name in METRICS_BY_EPOCH},
        *({name: drawn.estimate(name) for name in MEASURES} for drawn in kept),
    )


def _both(
    predictions: Predictions, plan: ResamplingPlan, statistics: Callable[[Predictions], Statistics]
) -> tuple[Bootstrapped, Bootstrapped]:
    """Return the ensemble's resamples and the mean member's."""
    whole = bootstrap(statistics(predictions), plan)
    if predictions.n_members == 1:
        return whole, whole
    members = [predictions.member(m) for m in range(predictions.n_members)]
    return whole, mean_of([bootstrap(statistics(member), plan) for member in members])


def compare_series(entries: Sequence[Entry], settings: Settings) -> list[Between]:
    """Compare every two swept ensembles, epoch by epoch, on each task both have with the same documents."""
    labels = series_labels(entries)
    comparisons = []
    for first in sorted(labels):
        for second in (number for number in sorted(labels) if number > first):
            runs = {
                (e.series, e.run.epoch or 0, task): e.run.predictions(task)
                for e in entries
                if e.series in (first, second)
                for task in e.run.top_level()
            }
            for task in dict.fromkeys(task for _, _, task in runs):
                distances = {
                    epoch: bootstrap(distance_statistics(a, b), report_plan(task, a, settings))
                    for (number, epoch, name), a in sorted(runs.items())
                    if number == first and name == task
                    # other documents, or none: nothing to compare at this epoch
                    if (b := runs.get((second, epoch, task))) is not None and same_documents(a, b)
                }
                if distances:
                    comparisons.append(
                        Between(
                            labels[first],
                            labels[second],
                            task,
                            tuple(distances),
                            tuple(d.estimate("agreement") for d in distances.values()),
                            tuple(d.estimate("total_variation") for d in distances.values()),
                        )
                    )
    return comparisons
