"""Ensembles trained anew with other seeds: what one of them alone cannot say.

Intervals over documents hold the members fixed. Replicates, runs that differ in their seeds only, show how the number
varies with the training: mean and standard deviation over replicates, Student's t interval for the mean, Welch's for
the difference of two sets, and a bootstrap over documents and replicates together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.run import Run
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import (
    MAX_MEDIAN_BIAS,
    Bootstrapped,
    bootstrap,
    mean_of,
    median_bias,
)
from lm_eval_lora_ensemble.metrics.predictions import check_same_documents
from lm_eval_lora_ensemble.metrics.registry import METRICS

_NOWHERE = (math.nan, math.nan)


@dataclass(frozen=True)
class Spread:
    """One metric over replicates.

    Attributes:
        values: one a replicate; of single members, one a member of every replicate.
        mean: of ``values``.
        standard_deviation: of ``values``, from n − 1; NaN for one.
        t: Student's interval for the mean over retrained replicates, for these documents; NaN for one value.
        two_way: percentile interval of the mean, documents and replicates drawn with replacement, each on its own;
            mirrored at the mean where the draws' median is more than one standard error away from it.
    """

    values: tuple[float, ...]
    mean: float
    standard_deviation: float
    t: tuple[float, float]
    two_way: tuple[float, float]


@dataclass(frozen=True)
class Replicated:
    """One task over the replicates that answered the same documents.

    Attributes:
        replicates: K.
        members: of all replicates together.
        documents: D.
        ensemble: by metric.
        member: of single members, all of all replicates; ``values`` has one for each.
        difference: ensemble minus its own mean member, by metric; one value a replicate.
    """

    replicates: int
    members: int
    documents: int
    ensemble: dict[str, Spread]
    member: dict[str, Spread]
    difference: dict[str, Spread]


def replicate_sets(runs: Sequence[Run], named: Sequence[Sequence[Path]] = ()) -> list[list[int]]:
    """Return which runs are replicates of each other, as lists of their indices.

    Args:
        runs: all of them.
        named: folders or results files, a list for each set; what they hold is no longer looked for by provenance.
            The rest are replicates where their results files have one recipe but for its seed, one base model,
            number of members, epoch and average, and no member in common.

    Raises:
        EnsembleError: a named place that is no run or several, or replicates that share members.
    """
    sets = [[_run_at(runs, place) for place in places] for places in named]
    for found, places in zip(sets, named, strict=True):
        if len(set(found)) < 2:
            raise EnsembleError(f"--replicates {' '.join(map(str, places))}: name two runs or more")
        for position, one in enumerate(found):
            for other in found[:position]:
                if one == other or _members(runs[one]) & _members(runs[other]):
                    raise EnsembleError(
                        f"{runs[one].source} and {runs[other].source} share members, so they are no replicates: "
                        "train with seeds further apart than the number of members"
                    )
    taken = {index for found in sets for index in found}
    alike: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        key = _but_for_seeds(run)
        if index in taken or key is None:
            continue
        others = alike.setdefault(key, [])
        if not any(_members(run) & _members(runs[other]) for other in others):
            others.append(index)
    return sets + [found for found in alike.values() if len(found) > 1]


def sharing_members(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for every two runs that would be replicates, had they not some members in common."""
    said = []
    for index, one in enumerate(runs):
        for other in runs[:index]:
            alike = _but_for_seeds(one) is not None and _but_for_seeds(one) == _but_for_seeds(other)
            shared = _members(one) & _members(other)
            if alike and shared and shared != _members(one):
                said.append(
                    f"{other.source} and {one.source} differ in their seeds and share {len(shared)} members: they are "
                    "not taken for replicates; train with seeds further apart than the number of members"
                )
    return said


def evaluate_replicates(runs: Sequence[Run], settings: Settings | None = None) -> dict[str, Replicated]:
    """Compute every metric over replicates, for each task and group that all of them have with gold answers.

    Raises:
        EnsembleError: fewer than two runs, no task in common, or other documents in one than in the others.
    """
    if len(runs) < 2:
        raise EnsembleError("replicates are two runs or more")
    chosen = settings or Settings()
    names = [name for name in runs[0].names() if all(name in run for run in runs)]
    results = {}
    for name in names:
        if any(run.predictions(name).is_gold is None for run in runs):
            continue
        for run in runs[1:]:
            check_same_documents(runs[0].predictions(name), run.predictions(name))
        results[name] = _evaluate(name, runs, chosen)
    if not results:
        raise EnsembleError(
            f"{', '.join(run.source for run in runs)} have no task with gold answers in common"
        )
    return results


def spread(
    values: Sequence[float], resampled: Sequence[FloatArray] | FloatArray, level: float, seed: int = 0
) -> Spread:
    """Return mean, standard deviation and both intervals of a metric.

    Args:
        values: (K,), one a replicate.
        resampled: K arrays (R,) or (M, R), each replicate's, or each of its M members', values on the same R resamples
            of documents; M may differ.
        level: two-sided coverage.
        seed: of the draws of replicates.

    Returns:
        The spread; intervals are NaN where a value is.
    """
    every = np.asarray(values, dtype=np.float64)
    mean = float(every.mean())
    if not np.isfinite(every).all():
        return Spread(tuple(every.tolist()), mean, math.nan, _NOWHERE, _NOWHERE)
    drawn = two_way(resampled, seed)
    drawn = drawn[np.isfinite(drawn)]
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(drawn, tails) if len(drawn) else _NOWHERE
    if len(drawn) and abs(median_bias(mean, drawn)) > MAX_MEDIAN_BIAS:
        low, high = 2 * mean - high, 2 * mean - low
    deviation = float(every.std(ddof=1)) if len(every) > 1 else math.nan
    return Spread(
        tuple(every.tolist()), mean, deviation, student_interval(every, level), (float(low), float(high))
    )


def two_way(resampled: Sequence[FloatArray] | FloatArray, seed: int = 0) -> FloatArray:
    """Draw K of K replicates with replacement for every resample of documents; return the (R,) means over them.

    Args:
        resampled: K arrays (R,), or (M, R) for the M members of a replicate: of one that is drawn, M of its M members
            are drawn with replacement too, and every member that is drawn counts as much.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    of_members = [np.atleast_2d(of_replicate) for of_replicate in resampled]
    sizes = np.array([len(values) for values in of_members])
    k, m, r = len(of_members), int(sizes.max()), of_members[0].shape[1]
    padded = np.stack([np.pad(values, ((0, m - len(values)), (0, 0))) for values in of_members])
    picks = rng.integers(k, size=(k, r))
    drawn = sizes[picks][:, None, :]  # how many members each drawn replicate has, (K, 1, R)
    members = rng.integers(np.broadcast_to(drawn, (k, m, r)))
    values = padded[picks[:, None, :], members, np.arange(r)]
    counted = np.arange(m)[:, None] < drawn
    means: FloatArray = np.where(counted, values, 0.0).sum(axis=(0, 1)) / drawn.sum(axis=(0, 1))
    return means


def student_interval(values: FloatArray, level: float) -> tuple[float, float]:
    """Return Student's t interval for the mean of ``values``; NaN for one value."""
    n = len(values)
    if n < 2:
        return _NOWHERE
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def welch_interval(a: FloatArray, b: FloatArray, level: float) -> tuple[float, float]:
    """Return Welch's t interval for the mean of ``a`` minus that of ``b``; NaN where one of them has one value."""
    if min(len(a), len(b)) < 2:
        return _NOWHERE
    parts = np.array([np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)])
    difference, variance = float(np.mean(a) - np.mean(b)), float(parts.sum())
    if variance == 0:
        return difference, difference
    freedom = variance**2 / float((parts**2 / [len(a) - 1, len(b) - 1]).sum())
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
    return difference - half, difference + half


def _evaluate(name: str, runs: Sequence[Run], settings: Settings) -> Replicated:
    plan = settings.plan(name, runs[0].predictions(name))
    ensembles: list[Bootstrapped] = []
    members: list[list[Bootstrapped]] = []
    for run in runs:
        p = run.predictions(name)
        whole = bootstrap(Battery(p, settings.bins), plan)
        ensembles.append(whole)
        members.append(
            [bootstrap(Battery(p.member(m), settings.bins), plan) for m in range(p.n_members)]
            if p.n_members > 1
            else [whole]
        )
    gains = [e.minus(mean_of(of)) for e, of in zip(ensembles, members, strict=True)]

    def over(parts: Sequence[Bootstrapped], metric: str) -> Spread:
        return spread(
            [part.value[metric] for part in parts],
            [part.resampled[metric] for part in parts],
            settings.level,
            settings.seed,
        )

    def over_members(metric: str) -> Spread:
        resampled = [np.stack([member.resampled[metric] for member in of]) for of in members]
        values = [member.value[metric] for of in members for member in of]
        return spread(values, resampled, settings.level, settings.seed)

    return Replicated(
        replicates=len(runs),
        members=sum(map(len, members)),
        documents=runs[0].predictions(name).n_documents,
        ensemble={metric: over(ensembles, metric) for metric in METRICS},
        member={metric: over_members(metric) for metric in METRICS},
        difference={metric: over(gains, metric) for metric in METRICS},
    )


def _run_at(runs: Sequence[Run], place: Path) -> int:
    """Return the one run whose files are at a named place."""
    where = place.resolve()
    date = "" if where.is_dir() else where.stem.rsplit("_", 1)[-1]
    found = [
        index
        for index, run in enumerate(runs)
        if any(_is_at(Path(file).resolve(), where, date) for file in run.files.values())
    ]
    if len(found) != 1:
        raise EnsembleError(
            f"--replicates {place} holds {len(found) or 'no'} run{'s' if len(found) != 1 else ''}; name the folder or "
            "results_*.json of one"
        )
    return found[0]


def _is_at(file: Path, where: Path, date: str) -> bool:
    return where in file.parents or (bool(date) and file.parent == where.parent and date in file.name)


def _but_for_seeds(run: Run) -> str | None:
    """Return what replicates have in common; None where the results file does not tell the recipe."""
    ensemble = run.config.get("lora_ensemble")
    recipe = ensemble.get("recipe") if isinstance(ensemble, Mapping) else None
    if not isinstance(ensemble, Mapping) or not isinstance(recipe, Mapping) or run.epoch == 0:
        return None
    settings = {key: value for key, value in recipe.items() if key not in ("seed", "output")}
    same = [ensemble.get(key) for key in ("base_model", "revision", "epoch", "average")]
    method = ensemble.get("method")
    if isinstance(
        method, Mapping
    ):  # what a method fits differs from seed to seed, what it was asked for does not
        same += [method.get("name"), method.get("options")]
    return json.dumps([settings, same, run.n_members], sort_keys=True, default=str)


def _members(run: Run) -> set[str]:
    """Return what tells the run's members from others'; empty where unknown."""
    ensemble = run.config.get("lora_ensemble")
    members = ensemble.get("members") if isinstance(ensemble, Mapping) else None
    if not isinstance(members, Iterable) or isinstance(members, (str, Mapping)):
        return set()
    return {
        json.dumps(member["sha256"], sort_keys=True)
        for member in members
        if isinstance(member, Mapping) and member.get("sha256")
    }
