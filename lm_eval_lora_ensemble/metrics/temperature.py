"""One temperature for all members, fitted to labelled documents, with its standard error.

``p_m(c) = softmax_c(s_m(c) / T)``, and T minimises the mean of ``−log (1/N) Σ_m P_m(golds)``: the mixture's negative
log-likelihood. That loss need not be unimodal in log T, so a grid over the whole range comes before the polish.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray, as_float, first_index

TEMPERATURE_RANGE = (1e-4, 100.0)
"""Where T is sought: beyond it answers are certain, or chance, to all practical purposes.

The lower end leaves room for scores per character of long answers: T = 5 of a sum over 500 characters is 0.01.
"""

_GRID = np.log(np.geomspace(*TEMPERATURE_RANGE, 71))
_INDISTINGUISHABLE = 1e-9  # nats between two mean losses


@dataclass(frozen=True)
class FittedTemperature:
    """The temperature of least mean negative log-likelihood.

    Attributes:
        temperature: T, within :data:`TEMPERATURE_RANGE`; T > 1 softens.
        standard_error: of log T; NaN at a limit and for a single document.
        at_limit: the search ended at a limit. At the lower one every document is right, so that no T is cold
            enough; at the upper one the scores say no more than chance.
        documents: how many it was fitted to.
    """

    temperature: float
    standard_error: float
    at_limit: bool
    documents: int


def fit_temperature_of_mixture(scores: npt.ArrayLike, is_gold: npt.ArrayLike) -> FittedTemperature:
    """Fit the one temperature of all members that minimises the negative log-likelihood of their mixture.

    The standard error is that of an M-estimate, ``√(D/(D−1) · Σ_d g_d²) / Σ_d h_d``, with g_d and h_d the first and
    second derivative of a document's loss in log T at the optimum. It holds whether or not some T makes the model
    right, as the inverse curvature alone does not.

    Args:
        scores: (N, D, C) members' scores in nats, already divided by whatever length they are judged by; −inf for a
            choice that the document lacks. A constant added to a document's scores changes nothing.
        is_gold: bool (D, C), the right choices, at least one a document; several count by their joint mass.

    Raises:
        EnsembleError: shapes that do not fit together, a NaN or +inf, a document without a right choice, or one whose
            right choices have probability 0 under every member.

    Example:
        >>> import numpy as np
        >>> scores = np.log([[[0.9, 0.1]] * 10])
        >>> right = np.array([[True, False]] * 7 + [[False, True]] * 3)
        >>> round(fit_temperature_of_mixture(scores, right).temperature, 3)  # 0.7 of 10 right, said with 0.9
        2.593
    """
    loss = _MixtureLoss(scores, is_gold)
    values = [loss(t) for t in _GRID]
    best = int(np.argmin(values))
    t = loss.minimum_between(_GRID[max(best - 1, 0)], _GRID[min(best + 1, len(_GRID) - 1)])
    least = min(loss(t), values[best])
    # the upper limit first: where the scores say nothing, every T is as good, and chance is what they amount to
    for limit, value in ((-1, values[-1]), (0, values[0])):
        if value <= least + _INDISTINGUISHABLE:
            return FittedTemperature(TEMPERATURE_RANGE[limit], float("nan"), True, loss.documents)
    return FittedTemperature(float(np.exp(t)), loss.standard_error(t), False, loss.documents)


class _MixtureLoss:
    """The mean negative log-likelihood of the mixture as a function of log T.

    Arrays are (C, N, D): sums over choices run along long contiguous rows.
    """

    def __init__(self, scores: npt.ArrayLike, is_gold: npt.ArrayLike) -> None:
        values, golds = _checked(scores, is_gold)
        z = np.ascontiguousarray(values.transpose(2, 0, 1))
        z -= z.max(axis=0)
        gold = np.broadcast_to(golds.T[:, None, :], z.shape)
        self._z = z
        self._gold = gold
        self._peak = np.where(gold, z, -np.inf).max(axis=0)  # (N, D), of the golds
        self._several = bool((golds.sum(axis=1) > 1).any())
        self.documents = z.shape[2]

    def __call__(self, t: float) -> float:
        """Return the mean loss at ``T = exp(t)``, nats."""
        return float(-self._log_mixture(self._log_mass(float(np.exp(-t)))).mean())

    def minimum_between(self, low: float, high: float) -> float:
        """Return log T of the least loss between two neighbours of the grid's best point.

        A minimum of the loss is known to half the digits only, and rounding would show in the ninth digit of what is
        made of T; where the slope changes its sign, T is its root, known to nearly all of them.
        """
        if self._slope(low) < 0 < self._slope(high):
            return float(optimize.brentq(self._slope, low, high, xtol=1e-13, rtol=1e-14))
        found = optimize.minimize_scalar(self, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
        return float(found.x)

    def _slope(self, t: float) -> float:
        """Return the derivative of the mean loss in log T."""
        return float(self._derivatives(t)[0].mean())

    def _log_mass(self, beta: float) -> FloatArray:
        """Return log P_m(golds) (N, D) at ``1/T = beta``."""
        log_mass: FloatArray = beta * self._peak - np.log(np.exp(beta * self._z).sum(axis=0))
        if self._several:
            reachable = np.isfinite(self._peak)
            from_peak = np.where(self._gold, self._z, -np.inf) - np.where(reachable, self._peak, 0.0)
            log_mass += np.where(
                reachable, np.log(np.maximum(np.exp(beta * from_peak).sum(axis=0), 1.0)), 0.0
            )
        return log_mass

    @staticmethod
    def _log_mixture(log_mass: FloatArray) -> FloatArray:
        peak = log_mass.max(axis=0)
        mixture: FloatArray = peak + np.log(np.exp(log_mass - peak).mean(axis=0))
        return mixture

    def standard_error(self, t: float) -> float:
        """Return the standard error of log T at the optimum, NaN where the loss has no curvature or scatter."""
        slope, curvature = self._derivatives(t)
        n, total = self.documents, curvature.sum()
        if n < 2 or not total > 0:
            return float("nan")
        return float(np.sqrt(n / (n - 1) * (slope**2).sum()) / total)

    def _derivatives(self, t: float) -> tuple[FloatArray, FloatArray]:
        """Return the first and second derivative of every document's loss in log T, each (D,)."""
        beta = float(np.exp(-t))
        z = np.where(np.isfinite(self._z), self._z, 0.0)
        p = np.exp(beta * self._z)
        p /= p.sum(axis=0)
        # from their own peak: beside a far likelier wrong choice the golds' masses would underflow, their shares not
        peak = np.where(np.isfinite(self._peak), self._peak, 0.0)
        of_golds = np.exp(np.where(self._gold, beta * (self._z - peak), -np.inf))
        mass = of_golds.sum(axis=0)
        of_golds = np.divide(of_golds, mass, where=mass > 0, out=np.zeros_like(p))
        mean, mean_of_golds = (p * z).sum(axis=0), (of_golds * z).sum(axis=0)
        # of log P_m(golds) in beta: a difference of means, then of variances
        first = mean_of_golds - mean
        second = (of_golds * (z - mean_of_golds) ** 2).sum(axis=0) - (p * (z - mean) ** 2).sum(axis=0)
        log_mass = self._log_mass(beta)
        weight = np.exp(log_mass - log_mass.max(axis=0))
        weight /= weight.sum(axis=0)
        slope = -(weight * first).sum(axis=0)
        curvature = slope**2 - (weight * (second + first**2)).sum(axis=0)
        # from beta = exp(−t) to t
        return -beta * slope, beta**2 * curvature + beta * slope


def _checked(scores: npt.ArrayLike, is_gold: npt.ArrayLike) -> tuple[FloatArray, BoolArray]:
    values = as_float(scores, "scores", 3)
    golds = np.asarray(is_gold, dtype=bool)
    if golds.shape != values.shape[1:]:
        raise EnsembleError(
            f"is_gold has shape {golds.shape}, and scores {values.shape}; they need one (D, C)"
        )
    bad = np.isnan(values) | (values == np.inf)
    if bad.any():
        index = first_index(bad)
        raise EnsembleError(f"score is {values[index]} at index {index}; score again in float32 or bfloat16")
    empty = np.isneginf(values.max(axis=2))
    if empty.any():
        raise EnsembleError(
            f"every choice has score -inf at index {first_index(empty)}: no distribution follows"
        )
    if not golds.any(axis=1).all():
        raise EnsembleError(f"document {int(np.argmin(golds.any(axis=1)))} has no right choice")
    impossible = np.isneginf(np.where(golds, values, -np.inf)).all(axis=(0, 2))
    if impossible.any():
        raise EnsembleError(
            f"the gold answer of document {int(np.argmax(impossible))} has probability 0: no temperature mends that"
        )
    return values, golds
