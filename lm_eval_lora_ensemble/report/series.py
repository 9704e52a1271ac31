"""The epochs of a sweep side by side: learning, overfitting, and what was kept of the prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.report.entries import Entry, short_name
from lm_eval_lora_ensemble.report.leaderboard import resamples_for
from lm_eval_lora_ensemble.uncertainty.battery import Battery
from lm_eval_lora_ensemble.uncertainty.comparison import distance_statistics
from lm_eval_lora_ensemble.uncertainty.intervals import (
    Bootstrapped,
    Estimate,
    Plan,
    Statistics,
    bootstrap,
    mean_of,
)
from lm_eval_lora_ensemble.uncertainty.predictions import Predictions
from lm_eval_lora_ensemble.uncertainty.result import Settings
from lm_eval_lora_ensemble.uncertainty.retention import MEASURES, retention

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
    """

    label: str
    task: str
    documents: int
    points: list[EpochPoint]


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
    found = []
    for number in sorted(labels):
        runs = sorted((e for e in entries if e.series == number), key=lambda e: e.run.epoch or 0)
        tasks = dict.fromkeys(name for e in runs for name in e.run.top_level())
        for task in tasks:
            having = [e for e in runs if task in e.run.names() and e.run.predictions(task).gold is not None]
            if len({e.run.epoch for e in having}) >= 2:
                found.append(_series(labels[number], task, having, settings))
    return found


def series_labels(entries: Sequence[Entry]) -> dict[int, str]:
    """Return the name of every swept ensemble."""
    paths = {e.series: e.run.series for e in entries if e.series is not None}
    names = {number: short_name(path) for number, path in paths.items()}
    if len(set(names.values())) < len(names):
        names = {number: f"{name} ({number + 1})" for number, name in names.items()}
    return names


def _series(label: str, task: str, entries: Sequence[Entry], settings: Settings) -> Series:
    by_epoch = {e.run.epoch or 0: e.run.predictions(task) for e in entries}
    any_predictions = next(iter(by_epoch.values()))
    clustered = len(entries[0].run.leaves(task)) > 1
    plan = _plan(task, any_predictions, settings, clustered=clustered)
    prior = by_epoch.get(0)
    points = [_point(epoch, by_epoch[epoch], prior, plan, settings.bins) for epoch in sorted(by_epoch)]
    return Series(label, task, any_predictions.n_documents, points)


def _plan(task: str, predictions: Predictions, settings: Settings, *, clustered: bool) -> Plan:
    n = resamples_for(predictions.n_documents, settings.resamples)
    return replace(settings.plan(task, predictions, clustered=clustered), resamples=n)


def _point(epoch: int, later: Predictions, prior: Predictions | None, plan: Plan, bins: int) -> EpochPoint:
    def metrics(of: Predictions) -> Statistics:
        return Battery(of, bins, METRICS_BY_EPOCH)

    ensemble, single = _both(later, plan, metrics)
    point = EpochPoint(
        epoch,
        later.n_members,
        {name: ensemble.estimate(name) for name in METRICS_BY_EPOCH},
        {name: single.estimate(name) for name in METRICS_BY_EPOCH},
    )
    if prior is None:
        return point
    try:
        kept, kept_single = _both(later, plan, lambda of: retention(prior, of))
    except EnsembleError:  # the prior answered other documents
        return point
    return EpochPoint(
        point.epoch,
        point.members,
        point.ensemble,
        point.single,
        {name: kept.estimate(name) for name in MEASURES},
        {name: kept_single.estimate(name) for name in MEASURES},
    )


def _both(
    predictions: Predictions, plan: Plan, statistics: Callable[[Predictions], Statistics]
) -> tuple[Bootstrapped, Bootstrapped]:
    """Return the ensemble's resamples and the mean member's."""
    whole = bootstrap(statistics(predictions), plan)
    if predictions.n_members == 1:
        return whole, whole
    members = [predictions.only([m]) for m in range(predictions.n_members)]
    return whole, mean_of([bootstrap(statistics(member), plan) for member in members])


def compare_series(entries: Sequence[Entry], settings: Settings) -> list[Between]:
    """Compare every two swept ensembles, epoch by epoch, on each task both have with the same documents."""
    labels = series_labels(entries)
    found = []
    for first in sorted(labels):
        for second in (number for number in sorted(labels) if number > first):
            runs = {
                (e.series, e.run.epoch, task): e.run.predictions(task)
                for e in entries
                if e.series in (first, second)
                for task in e.run.top_level()
            }
            for task in dict.fromkeys(task for _, _, task in runs):
                epochs = sorted(
                    epoch
                    for number, epoch, name in runs
                    if number == first
                    and name == task
                    and (second, epoch, task) in runs
                    and epoch is not None
                )
                pairs = [(runs[first, epoch, task], runs[second, epoch, task]) for epoch in epochs]
                try:
                    drawn = [_between(a, b, _plan(task, a, settings, clustered=False)) for a, b in pairs]
                except EnsembleError:  # other documents
                    continue
                if drawn:
                    found.append(
                        Between(
                            labels[first],
                            labels[second],
                            task,
                            tuple(epochs),
                            tuple(d.estimate("agreement") for d in drawn),
                            tuple(d.estimate("total_variation") for d in drawn),
                        )
                    )
    return found


def _between(a: Predictions, b: Predictions, plan: Plan) -> Bootstrapped:
    return bootstrap(distance_statistics(a, b), plan)
