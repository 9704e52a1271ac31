"""Recalibration: a few parameters fitted on one split or task, applied to another.

Scaling log-probabilities is scaling logits: softmax does not see the constant between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray, as_float, as_is_gold
from lm_eval_lora_ensemble.metrics.choices import log_choice_probabilities
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.temperature import FittedTemperature, fit_temperature_of_mixture

Order = Literal["pool_then_calibrate", "calibrate_then_pool", "shared_then_pool"]
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True)
class TemperatureScaling:
    """``p(c)^{1/T} / Σ_c' p(c')^{1/T}`` (Guo et al. 2017); T > 1 softens. Keeps the argmax.

    Attributes:
        temperature: T > 0.
        at_limit: the search ended at its limit: the fit split is all right, or no better than chance.
    """

    temperature: float
    at_limit: bool = False

    def __call__(self, log_p: FloatArray) -> FloatArray:
        """Scale (..., C) log-probabilities."""
        return log_choice_probabilities(log_p / self.temperature)


@dataclass(frozen=True, eq=False)
class VectorScaling:
    """``softmax_c(w_c log p(c) + b_c)`` (Guo et al. 2017); can change the argmax.

    For choices whose position means something, such as answer letters; one per task.

    Attributes:
        slope: (C,), w.
        offset: (C,), b.
    """

    slope: FloatArray
    offset: FloatArray

    def __call__(self, log_p: FloatArray) -> FloatArray:
        """Scale (..., C) log-probabilities."""
        return log_choice_probabilities(log_p * self.slope + self.offset)


def _log_gold_mass(log_p: FloatArray, is_gold: BoolArray) -> FloatArray:
    """Return (…, D) log P_G of (…, D, C) log-probabilities."""
    with np.errstate(divide="ignore"):
        mass: FloatArray = special.logsumexp(np.where(is_gold, log_p, -np.inf), axis=-1)
    return mass


def _checked(log_p: FloatArray, gold: npt.ArrayLike) -> BoolArray:
    """Return which choices of (D, C) are right, some of them possible in every document."""
    d, c = log_p.shape
    is_gold = as_is_gold(gold, np.full(d, c), c)
    impossible = np.isneginf(_log_gold_mass(log_p, is_gold))
    if impossible.any():
        raise EnsembleError(
            f"the gold answer of document {int(np.argmax(impossible))} has probability 0: "
            "no temperature mends that"
        )
    return is_gold


def fit_temperature(log_p: npt.ArrayLike, gold: npt.ArrayLike) -> TemperatureScaling:
    """Fit the temperature of least mean negative log-likelihood.

    Args:
        log_p: (D, C) log-probabilities, nats; −inf for padding.
        gold: (D,) index of the right choice, or (D, C) booleans where several may be.

    Returns:
        T within ``temperature.TEMPERATURE_RANGE``; see :attr:`TemperatureScaling.at_limit`.

    Raises:
        EnsembleError: a gold answer of probability 0.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> import numpy as np
        >>> log_p, gold = np.log([[0.9, 0.1]] * 4), np.array([0, 0, 0, 1])  # 0.9 sure, right 3 times in 4
        >>> scaling = metrics.fit_temperature(log_p, gold)
        >>> round(scaling.temperature, 3), np.exp(scaling(log_p[0])).round(3).tolist()  # ln 9 / ln 3
        (2.0, [0.75, 0.25])
    """
    values = as_float(log_p, "log_p", 2)
    return _scaling(fit_temperature_of_mixture(values[None], _checked(values, gold)))


def fit_shared_temperature(log_p: npt.ArrayLike, gold: npt.ArrayLike) -> TemperatureScaling:
    """Fit one temperature for all members that minimises the loss of their pool.

    Args:
        log_p: (N, D, C) members' log-probabilities, nats; −inf for padding.
        gold: (D,) index of the right choice, or (D, C) booleans where several may be.

    Returns:
        T within ``temperature.TEMPERATURE_RANGE``; see :attr:`TemperatureScaling.at_limit`.

    Raises:
        EnsembleError: a gold answer to which every member gives probability 0.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> import numpy as np
        >>> log_p, gold = np.log([[[0.9, 0.1]] * 4] * 2), np.array([0, 0, 0, 1])  # two equal members
        >>> round(metrics.fit_shared_temperature(log_p, gold).temperature, 3)  # ln 9 / ln 3
        2.0
    """
    values = as_float(log_p, "log_p", 3)
    return _scaling(fit_temperature_of_mixture(values, _checked(values.max(axis=0), gold)))


def _scaling(fitted: FittedTemperature) -> TemperatureScaling:
    return TemperatureScaling(fitted.temperature, fitted.at_limit)


def fit_vector(log_p: npt.ArrayLike, gold: npt.ArrayLike) -> VectorScaling:
    """Fit a slope and an offset for each choice position by L-BFGS.

    Args:
        log_p: (D, C) log-probabilities, nats, all finite.
        gold: (D,) index of the right choice, or (D, C) booleans where several may be.

    Returns:
        Slopes, and offsets less their mean, (C,) each; both are sought in [−100, 100].

    Raises:
        EnsembleError: documents with fewer choices than others, or a probability of 0.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> import numpy as np
        >>> log_p, gold = np.log([[0.9, 0.1]] * 4), np.array([0, 0, 0, 1])  # 0.9 sure, right 3 times in 4
        >>> scaling = metrics.fit_vector(log_p, gold)
        >>> scaling.slope.shape, np.exp(scaling(log_p[0])).round(3).tolist()
        ((2,), [0.75, 0.25])
    """
    log_p = as_float(log_p, "log_p", 2)
    if not np.isfinite(log_p).all():
        raise EnsembleError(
            "vector scaling needs the same choices, none of probability 0, in every document; use temperature"
        )
    d, c = log_p.shape
    is_gold = _checked(log_p, gold)

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        slope, offset = np.split(parameters, 2)
        scaled = log_choice_probabilities(log_p * slope + offset)
        mass = _log_gold_mass(scaled, is_gold)
        within = np.where(
            is_gold, np.exp(scaled - mass[:, None]), 0.0
        )  # a gold choice's share of the gold mass
        residual = (np.exp(scaled) - within) / d
        gradient = np.concatenate([(residual * log_p).sum(axis=0), residual.sum(axis=0)])
        return float(-mass.mean()), gradient

    start = np.concatenate([np.ones(c), np.zeros(c)])
    # Separable data have no finite optimum; the bounds give one that is as good as certain.
    bounds = [(-100.0, 100.0)] * (2 * c)
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    slope, offset = np.split(found.x, 2)
    return VectorScaling(slope, offset - offset.mean())


@dataclass(frozen=True, eq=False)
class Recalibrated:
    """Predictions after recalibration, and what was fitted for them.

    Attributes:
        order: what came first.
        scalings: one for the pool (or shared by the members), or one for each member.
        predictions: of the test documents; a single member where the pool itself was calibrated.
    """

    order: Order
    scalings: tuple[TemperatureScaling | VectorScaling, ...]
    predictions: Predictions


def recalibrate(
    calibration: Predictions,
    test: Predictions,
    order: Order = "pool_then_calibrate",
    *,
    how: Literal["temperature", "vector"] = "temperature",
) -> Recalibrated:
    """Fit on one set of documents and apply to another, before or after averaging the members.

    Averaging calibrated members gives an under-confident ensemble (Rahaman & Thiery 2021), so the order
    matters:

    * ``pool_then_calibrate``: scale the ensemble's p̄; members, and so mutual information, are gone.
    * ``calibrate_then_pool``: each member its own scaling, then average.
    * ``shared_then_pool``: one temperature for all members, fitted for their average.

    Args:
        calibration: with gold answers.
        test: of the same members.
        order: see above.
        how: one temperature, or a slope and an offset for each choice position.

    Returns:
        The test documents' new predictions, with what was fitted.

    Raises:
        EnsembleError: different numbers of members, unknown gold answers, an unknown order, a shared vector
            scaling, vector scaling of ragged documents, or a gold answer of probability 0.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> from math import log
        >>> scores = [[[log(0.9), log(0.1)]] * 4] * 2  # two members, 0.9 sure, right 3 times in 4
        >>> predictions = metrics.Predictions.from_scores(scores, gold=[0, 0, 0, 1])
        >>> mended = metrics.recalibrate(predictions, predictions)
        >>> mended.predictions.confidence.round(3).tolist(), mended.predictions.n_members
        ([0.75, 0.75, 0.75, 0.75], 1)
    """
    if calibration.n_members != test.n_members:
        raise EnsembleError(
            f"calibration samples have {calibration.n_members} members and test samples {test.n_members}: "
            "they come from two ensembles"
        )
    gold = calibration.require_gold()
    fit: Callable[[FloatArray, BoolArray], TemperatureScaling | VectorScaling]
    fit = fit_temperature if how == "temperature" else fit_vector
    if order == "pool_then_calibrate":
        pooled = fit(calibration.log_mixture, gold)
        return Recalibrated(order, (pooled,), _apply(test, pooled(test.log_mixture)[None]))
    if order == "calibrate_then_pool":
        each = tuple(fit(member, gold) for member in calibration.log_probabilities)
        scaled = np.stack([s(m) for s, m in zip(each, test.log_probabilities, strict=True)])
        return Recalibrated(order, each, _apply(test, scaled))
    if order == "shared_then_pool" and how == "temperature":
        shared = fit_shared_temperature(calibration.log_probabilities, gold)
        return Recalibrated(order, (shared,), _apply(test, shared(test.log_probabilities)))
    raise EnsembleError(f"order {order!r} with {how} scaling is not offered; orders are {', '.join(ORDERS)}")


def _apply(test: Predictions, log_p: FloatArray) -> Predictions:
    return test.with_log_probabilities(log_p)
