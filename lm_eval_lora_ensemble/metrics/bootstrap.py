"""Bootstrap intervals for any metric that can be computed under document weights.

A resample of D documents is a vector of D counts. Metrics here are functions of such weights, for many
resamples at once, so that nothing is sorted, binned or scored again for a resample. Two metrics on the same
resamples are paired: their difference has an interval of its own, usually much narrower.

What is resampled are documents, with the trained members held fixed: the intervals say how the number would
vary with other questions of the same kind, not with other training seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import special
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray, IntArray

Statistics: TypeAlias = Callable[[FloatArray], Mapping[str, FloatArray]]
"""From weights (R, D) to one value a resample, (R,), for each of several metrics."""

_CHUNK = 100_000
"""Weights held at once: 0.8 MB. Larger arrays fall out of the cache, which costs a factor of three."""

MAX_MEDIAN_BIAS = 1.0
"""How many standard errors of median bias BCa is trusted to correct.

Plug-in calibration errors of well calibrated models exceed this: nearly every resample lies above the value,
and BCa would return the few that do not as a narrow, wrong interval.
"""

JACKKNIFE_GROUPS = 200
"""With more documents than this, BCa's acceleration comes from leaving out groups of them.

The skewness of the estimator that it measures is the same in expectation; with 200 groups its error is below
0.004, which moves a 95 % limit by about a hundredth of a standard error.
"""


@dataclass(frozen=True)
class Estimate:
    """A value and how sure it is.

    Attributes:
        value: on the documents as they are.
        standard_error: standard deviation over the resamples.
        bias: mean over the resamples minus the value. Resampling adds as much bias to a binned calibration
            error as sampling put into it, so ``value − bias`` is nearer the truth.
        percentile: percentile interval, quantiles of the resamples.
        basic: basic interval, the percentile interval mirrored at the value. It removes bias and may reach
            beyond the metric's range; a lower limit below 0 says that 0 is not excluded.
        bca: bias-corrected and accelerated interval (Efron 1987). NaN where the resamples' median is more
            than one standard error away from the value.
    """

    value: float
    standard_error: float
    bias: float
    percentile: tuple[float, float]
    basic: tuple[float, float]
    bca: tuple[float, float]

    @property
    def quoted(self) -> tuple[float, float, str]:
        """The interval to quote and its name: BCa where it is defined, the basic one elsewhere."""
        if np.isnan(self.bca[0]):
            return (*self.basic, "basic")
        return (*self.bca, "bca")


@dataclass(frozen=True)
class ResamplingPlan:
    """How documents are resampled; two metrics under equal plans are paired.

    Attributes:
        documents: D.
        resamples: R.
        seed: of the random generator.
        clusters: (D,) label of each document's cluster; whole clusters are drawn then. Without it documents
            are drawn one by one.
        strata: (D,) label; each stratum keeps its number of documents (or clusters).
        level: two-sided coverage of the intervals.
    """

    documents: int
    resamples: int = 1000
    seed: int = 0
    clusters: npt.NDArray[np.generic] | None = None
    strata: npt.NDArray[np.generic] | None = None
    level: float = 0.95
    units: IntArray = field(init=False, repr=False)
    _strata_of_units: list[IntArray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise EnsembleError("there is no document to resample")
        if self.resamples < 2:
            raise EnsembleError(f"resamples is {self.resamples}; at least 2 are needed for an interval")
        if self.seed < 0:
            raise EnsembleError(f"seed is {self.seed}; a whole number of at least 0 is needed")
        if not 0 < self.level < 1:
            raise EnsembleError(f"level is {self.level}; a coverage between 0 and 1 is needed")
        labels = np.arange(self.documents) if self.clusters is None else np.asarray(self.clusters)
        strata = np.zeros(self.documents, dtype=int) if self.strata is None else np.asarray(self.strata)
        if labels.shape != (self.documents,) or strata.shape != (self.documents,):
            raise EnsembleError(f"clusters and strata need one label for each of {self.documents} documents")
        _, stratum = np.unique(strata, return_inverse=True)
        _, cluster = np.unique(labels, return_inverse=True)
        # The same label in two strata names two clusters.
        pairs, units = np.unique(np.stack([stratum, cluster]), axis=1, return_inverse=True)
        object.__setattr__(self, "units", units.astype(np.int64).reshape(-1))
        members = [np.flatnonzero(pairs[0] == s) for s in range(stratum.max() + 1)]
        object.__setattr__(self, "_strata_of_units", members)

    @property
    def n_units(self) -> int:
        """How many documents, or clusters, are drawn from."""
        return int(self.units.max()) + 1

    def draws(self) -> Iterator[FloatArray]:
        """Yield the resamples' weights, (r, D) at a time, the same ones at every call."""
        rng = np.random.default_rng(self.seed)
        rows = max(1, _CHUNK // self.documents)
        for start in range(0, self.resamples, rows):
            yield self._spread(self._draw(rng, min(rows, self.resamples - start)))

    def _draw(self, rng: np.random.Generator, rows: int) -> FloatArray:
        """Return how often each unit is drawn, (rows, units): n from n with replacement in each stratum."""
        counts = np.zeros((rows, self.n_units))
        for units in self._strata_of_units:
            n = len(units)
            picks = rng.integers(n, size=(rows, n), dtype=np.int32) + n * np.arange(rows)[:, None]
            counts[:, units] = np.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n)
        return counts

    def _spread(self, counts: FloatArray) -> FloatArray:
        """Give every document its unit's count."""
        return counts if np.array_equal(self.units, np.arange(self.documents)) else counts[:, self.units]

    def leave_out(self) -> Iterator[FloatArray]:
        """Yield the jackknife's weights: each unit, or random group of units, left out in turn; none of one unit."""
        if self.n_units < 2:
            return
        groups = min(self.n_units, JACKKNIFE_GROUPS)
        order = np.random.default_rng(self.seed).permutation(self.n_units)
        group_of_unit = np.empty(self.n_units, dtype=np.int64)
        for g, units in enumerate(np.array_split(order, groups)):
            group_of_unit[units] = g
        group = group_of_unit[self.units]
        rows = max(1, _CHUNK // self.documents)
        for start in range(0, groups, rows):
            left_out = np.arange(start, min(start + rows, groups))
            yield (group[None, :] != left_out[:, None]).astype(np.float64)


@dataclass(frozen=True)
class Bootstrapped:
    """Metrics on the documents as they are, on every resample, and with each part left out.

    Attributes:
        plan: how the resamples were drawn.
        value: by metric name.
        resampled: (R,) by metric name.
        jackknife: (G,) by metric name.
    """

    plan: ResamplingPlan
    value: dict[str, float]
    resampled: dict[str, FloatArray]
    jackknife: dict[str, FloatArray]

    def estimate(self, name: str) -> Estimate:
        """Return a metric's value with its intervals; they are NaN where a single document or cluster is drawn from."""
        if self.plan.n_units < 2:
            nothing = np.full(2, np.nan)
            return interval(self.value[name], nothing, nothing, self.plan.level)
        return interval(self.value[name], self.resampled[name], self.jackknife[name], self.plan.level)

    def minus(self, other: Bootstrapped) -> Bootstrapped:
        """Return the paired difference of every metric both have.

        Raises:
            EnsembleError: the resamples of the two are not the same.
        """
        if not _same_plan(self.plan, other.plan):
            raise EnsembleError("a paired difference needs both sides on the same resamples: use one plan")
        names = [name for name in self.value if name in other.value]
        with np.errstate(invalid="ignore"):  # of two infinite values there is no difference
            return Bootstrapped(
                self.plan,
                {n: self.value[n] - other.value[n] for n in names},
                {n: self.resampled[n] - other.resampled[n] for n in names},
                {n: self.jackknife[n] - other.jackknife[n] for n in names},
            )


def _same_plan(a: ResamplingPlan, b: ResamplingPlan) -> bool:
    return (a.seed, a.resamples, a.documents) == (b.seed, b.resamples, b.documents) and np.array_equal(
        a.units, b.units
    )


def mean_of(parts: Sequence[Bootstrapped]) -> Bootstrapped:
    """Return the mean of every metric over several models on the same resamples."""
    first = parts[0]
    if not all(_same_plan(first.plan, part.plan) for part in parts):
        raise EnsembleError("a mean over models needs all of them on the same resamples: use one plan")
    return Bootstrapped(
        first.plan,
        {n: float(np.mean([part.value[n] for part in parts])) for n in first.value},
        {n: np.mean([part.resampled[n] for part in parts], axis=0) for n in first.value},
        {n: np.mean([part.jackknife[n] for part in parts], axis=0) for n in first.value},
    )


def bootstrap(statistics: Statistics, plan: ResamplingPlan) -> Bootstrapped:
    """Evaluate ``statistics`` on the documents as they are and on every resample of ``plan``."""
    value = {name: float(v[0]) for name, v in statistics(np.ones((1, plan.documents))).items()}
    # The products are too small for BLAS to gain from threads, and on a busy machine its threads spin while
    # they wait for each other: measured, ten times slower.
    with _thread_pools().limit(limits=1, user_api="blas"):
        resampled = _collect(statistics, plan.draws(), value)
        jackknife = _collect(statistics, plan.leave_out(), value)
    return Bootstrapped(plan, value, resampled, jackknife)


@functools.cache
def _thread_pools() -> ThreadpoolController:
    """Find the loaded BLAS libraries once: it takes longer than bootstrapping a small task."""
    return ThreadpoolController()


def _collect(
    statistics: Statistics, chunks: Iterator[FloatArray], names: Iterable[str]
) -> dict[str, FloatArray]:
    parts = [statistics(weights) for weights in chunks]
    return {name: np.concatenate([part[name] for part in parts] or [np.empty(0)]) for name in names}


def interval(value: float, resampled: FloatArray, jackknife: FloatArray, level: float = 0.95) -> Estimate:
    """Return percentile, basic and BCa intervals (Efron 1987; Davison & Hinkley 1997, chapter 5).

    With ``z₀ = Φ⁻¹(share of resamples below the value, equals counted half)`` and the jackknife's
    acceleration ``a = Σ l³ / (6 (Σ l²)^{3/2})``, the limits are the resamples' quantiles at
    ``Φ(z₀ + (z₀ + z)/(1 − a(z₀ + z)))`` for z = ±Φ⁻¹((1 + level)/2). Resamples in which the metric is
    undefined (NaN: one class only was drawn) are left out as long as they are fewer than half.

    Args:
        value: on the documents as they are.
        resampled: (R,) values on the resamples.
        jackknife: (G,) values with each unit left out.
        level: two-sided coverage.

    Returns:
        The estimate; its intervals are NaN where the value or most resamples are undefined.
    """
    nowhere = (float("nan"), float("nan"))
    defined = resampled[np.isfinite(resampled)]
    if not np.isfinite(value) or len(defined) < max(2, len(resampled) / 2):
        return Estimate(value, float("nan"), float("nan"), nowhere, nowhere, nowhere)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    low, high = (float(limit) for limit in np.quantile(defined, tails))
    bca = nowhere
    if abs(z0 := median_bias(value, defined)) <= MAX_MEDIAN_BIAS:
        z = z0 + special.ndtri(tails)
        shares = special.ndtr(z0 + z / (1 - _acceleration(jackknife) * z))
        first, last = np.quantile(defined, shares)
        bca = (float(first), float(last))
    return Estimate(
        value=value,
        standard_error=float(np.std(defined, ddof=1)),
        bias=float(np.mean(defined)) - value,
        percentile=(low, high),
        basic=(2 * value - high, 2 * value - low),
        bca=bca,
    )


def median_bias(value: float, resampled: FloatArray) -> float:
    """Return z₀ = Φ⁻¹(share of resamples below the value), equals counted half: 0 where the value is their median."""
    # Sums in another order differ in their last digits; such resamples are equal to the value, not below it.
    slack = 1e-12 * max(1.0, abs(value))
    below = np.mean(resampled < value - slack) + 0.5 * np.mean(np.abs(resampled - value) <= slack)
    return float(special.ndtri(below))


def _acceleration(jackknife: FloatArray) -> float:
    """Return a, the skewness of the influence values over 6√n; 0 where nothing varies."""
    defined = jackknife[np.isfinite(jackknife)]
    if len(defined) < 3:
        return 0.0
    influence = defined.mean() - defined
    scale = float(np.sum(influence**2))
    if scale <= (1e-12 * max(1.0, float(np.abs(defined).max()))) ** 2 * len(defined):
        return 0.0
    return float(np.sum(influence**3) / (6 * scale**1.5))
