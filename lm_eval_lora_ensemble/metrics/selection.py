"""Selective prediction: how much better are the answers if the most uncertain ones are withheld?

Documents are accepted in ascending order of an uncertainty score. Where scores tie, the order among equals
is arbitrary, so sums over partial runs of equals are their mean over all orders: exact, not sampled.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.ranking import Ranking, Runs


@functools.lru_cache(maxsize=4)
def _harmonic(n: int) -> FloatArray:
    """Return H_0 … H_n with ``H_k = Σ_{j ≤ k} 1/j``."""
    return np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, n + 1))])


def _harmonic_at(weights: FloatArray) -> FloatArray:
    """Look H up at whole-numbered weights of any shape."""
    size = int(weights.max()) if weights.size else 0
    table = _harmonic(1 << max(size, 1).bit_length())
    values: FloatArray = table[weights.astype(np.int64)]
    return values


def area_under_risk_coverage(runs: Runs) -> FloatArray:
    """(R,): mean over k = 1 … n of the error rate among the k most certain documents.

    Within a run of equals that starts after W documents with E errors and has error rate r, the expected
    error rate at W + j is ``(E + r j)/(W + j) = r + (E − r W)/(W + j)``, whose sum over j is a difference of
    harmonic numbers. Weights have to be whole numbers, as resampling counts are.
    """
    # E − r W is the same at both ends of a run, as r is its slope.
    offset = runs.positive_up_to - runs.rate * runs.weight_up_to
    harmonic = _harmonic_at(runs.weight_up_to)
    excess = np.einsum("rg,rg->r", offset, harmonic)
    excess -= np.einsum("rg,rg->r", offset[:, 1:], harmonic[:, :-1])
    area: FloatArray = (runs.positives[:, 0] + excess) / runs.total[:, 0]
    return area


def optimal_area(runs: Runs) -> FloatArray:
    """(R,): the least area any ranking could have, all errors last."""
    n, errors = runs.total[:, 0], runs.positives[:, 0]
    right = n - errors
    area: FloatArray = (errors - right * (_harmonic_at(n) - _harmonic_at(right))) / n
    return area


def accuracy_at(runs: Runs, coverage: float) -> FloatArray:
    """(R,): accuracy among the ⌈coverage · n⌉ most certain documents."""
    wanted = np.ceil(coverage * runs.total - 1e-9)
    place = (runs.weight_up_to < wanted).sum(axis=1, keepdims=True)
    place = np.minimum(place, runs.weight.shape[1] - 1)
    weight, positive, up_to, errors_up_to = (
        np.take_along_axis(a, place, axis=1)
        for a in (runs.weight, runs.positive, runs.weight_up_to, runs.positive_up_to)
    )
    rate = positive / np.where(weight > 0, weight, 1.0)
    errors = errors_up_to - rate * (up_to - wanted)
    accuracy: FloatArray = (1 - errors / wanted)[:, 0]
    return accuracy


def coverage_at(runs: Runs, risk: float) -> FloatArray:
    """(R,): largest share of documents that a threshold accepts with an error rate of at most ``risk``."""
    within = (runs.positive_up_to <= risk * runs.weight_up_to + 1e-9) & (runs.weight_up_to > 0)
    accepted = np.where(within, runs.weight_up_to, 0.0).max(axis=1)
    coverage: FloatArray = accepted / runs.total[:, 0]
    return coverage


@dataclass(frozen=True)
class RiskCoverage:
    """The risk–coverage curve at every distinct score, and its summaries.

    Attributes:
        coverage: (G,), share of documents accepted, ascending to 1.
        risk: (G,), error rate among them; the last value is the error rate of all documents.
        aurc: area under the curve over all coverages k/n, lower is better.
        excess_aurc: aurc less that of the best possible ranking, ≥ 0, lower is better.
    """

    coverage: FloatArray
    risk: FloatArray
    aurc: float
    excess_aurc: float


def risk_coverage(uncertainty: npt.ArrayLike, error: npt.ArrayLike) -> RiskCoverage:
    """Return the risk–coverage curve, AURC and excess AURC (Geifman & El-Yaniv 2017; Geifman et al. 2019).

    ``AURC = (1/n) Σ_k risk(k)`` where risk(k) is the error rate among the k most certain documents. The
    optimum is the finite sample's own, not the approximation ``r + (1 − r) ln(1 − r)`` of the paper.

    Args:
        uncertainty: (D,), higher is less certain: 1 − max p, entropy, mutual information.
        error: (D,), 1 where the answer is wrong.

    Returns:
        The curve, a point for each distinct score; rates, coverages and areas in [0, 1].

    Raises:
        EnsembleError: a NaN score, no documents, or lengths that differ.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> curve = metrics.risk_coverage([0.1, 0.4], [False, True])
        >>> curve.coverage.tolist(), curve.risk.tolist()
        ([0.5, 1.0], [0.0, 0.5])
        >>> curve.aurc, curve.excess_aurc
        (0.25, 0.0)
    """
    runs = Ranking(uncertainty, error).runs()
    area = float(area_under_risk_coverage(runs)[0])
    return RiskCoverage(
        coverage=runs.weight_up_to[0] / runs.total[0, 0],
        risk=runs.positive_up_to[0] / runs.weight_up_to[0],
        aurc=area,
        excess_aurc=area - float(optimal_area(runs)[0]),
    )


def accuracy_at_coverage(uncertainty: npt.ArrayLike, error: npt.ArrayLike, coverage: float) -> float:
    """Return the accuracy among the ⌈coverage · D⌉ most certain documents, equals taken in proportion.

    Arguments and errors as :func:`risk_coverage`; ``coverage`` in (0, 1].

    Returns:
        In [0, 1], higher is better.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.accuracy_at_coverage([0.1, 0.2, 0.3, 0.4], [0, 1, 1, 1], coverage=0.5)
        0.5
    """
    if not 0 < coverage <= 1:
        raise EnsembleError(f"coverage is {coverage}; a share in (0, 1] is needed")
    return float(accuracy_at(Ranking(uncertainty, error).runs(), coverage)[0])


def coverage_at_risk(uncertainty: npt.ArrayLike, error: npt.ArrayLike, risk: float = 0.05) -> float:
    """Return the largest share of documents that a threshold accepts at an error rate of at most ``risk``.

    The threshold is chosen with the answers known: this is a description of the ranking, not a guarantee
    for new documents.

    Arguments and errors as :func:`risk_coverage`; ``risk`` in [0, 1].

    Returns:
        In [0, 1], higher is better; 0 if even the most certain documents are wrong too often.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.coverage_at_risk([0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1], risk=0.05)
        0.75
    """
    if not 0 <= risk <= 1:
        raise EnsembleError(f"risk is {risk}; a rate in [0, 1] is needed")
    return float(coverage_at(Ranking(uncertainty, error).runs(), risk)[0])
