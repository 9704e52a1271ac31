"""Whole strings: how unlikely the mixture finds them, and how far its members disagree about them.

A string is scored as a whole: member m gives it the loglikelihood s_m, the sum over its tokens. Values are ratios of
sums over the strings, as perplexities are: Σ nll / Σ tokens, not the mean of each string's own quotient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.metrics.arrays import FloatArray

Unit = Literal["token", "byte", "word"]


class StringMetric(NamedTuple):
    """One value of a task of whole strings.

    Attributes:
        quantity: a key of :func:`quantities`, what is summed over the strings.
        unit: by the number of which it is divided.
        direction: ``lower`` where a lower value is better, empty where neither is.
    """

    quantity: str
    unit: Unit
    direction: str = ""


STRING_METRICS: dict[str, StringMetric] = {
    "nll_per_token": StringMetric("nll", "token", "lower"),
    "nll_per_byte": StringMetric("nll", "byte", "lower"),
    "nll_per_word": StringMetric("nll", "word", "lower"),
    "member_nll_per_token": StringMetric("member_nll", "token", "lower"),
    "member_nll_per_byte": StringMetric("member_nll", "byte", "lower"),
    "member_nll_per_word": StringMetric("member_nll", "word", "lower"),
    "reverse_mutual_information": StringMetric("reverse_mutual_information", "token"),
}


def quantities(members: npt.ArrayLike) -> Mapping[str, FloatArray]:
    """Return what each string adds to the sums, in nats.

    Args:
        members: (N, D) loglikelihoods s_m of D strings.

    Returns:
        Each (D,): ``nll`` −log((1/N) Σ_m exp s_m), of the mixture; ``member_nll`` −(1/N) Σ_m s_m, the members' mean;
        ``reverse_mutual_information`` their difference, 0 to ∞: 0 where all members agree or N is 1, NaN where all
        are −∞. Rounding can leave it below 0 by some 1e-16 of the members' spread.

    Example:
        >>> found = quantities([[-8.0], [-10.0]])
        >>> {name: round(float(value[0]), 4) for name, value in found.items()}
        {'nll': 8.5662, 'member_nll': 9.0, 'reverse_mutual_information': 0.4338}
    """
    scores = np.asarray(members, dtype=np.float64)
    peak = scores.max(axis=0)
    with np.errstate(invalid="ignore"):
        below = scores - peak
        # relative to the best member, or the difference of two sums of thousands of nats would lose its digits
        mixture, mean = np.log1p(np.expm1(below).mean(axis=0)), below.mean(axis=0)
        return {
            "nll": -np.where(np.isfinite(peak), peak + mixture, peak),
            "member_nll": -scores.mean(axis=0),
            "reverse_mutual_information": mixture - mean,
        }


def ratio(values: npt.ArrayLike, counts: npt.ArrayLike) -> float:
    """Return Σ values / Σ counts, (D,) each; NaN where a count is NaN or all are 0.

    Example:
        >>> ratio([2.0, 10.0], [1, 3])
        3.0
    """
    numerator, denominator = (float(np.sum(np.asarray(part, dtype=np.float64))) for part in (values, counts))
    return numerator / denominator if denominator else float("nan")


def linearised(values: npt.ArrayLike, counts: npt.ArrayLike) -> FloatArray:
    """Return (D,) numbers whose mean is the ratio R and whose standard error is R's, to first order.

    z_d = R + (value_d − R count_d) / mean count. The standard error of their mean is the ratio estimator's by the delta
    method (Cochran 1977, section 6.4).

    Example:
        >>> linearised([2.0, 10.0], [1, 3]).tolist()
        [2.5, 3.5]
    """
    numerators, denominators = (np.asarray(part, dtype=np.float64) for part in (values, counts))
    found = ratio(numerators, denominators)
    if not np.isfinite(found):
        return np.full(len(numerators), found)
    return np.asarray(found + (numerators - found * denominators) / denominators.mean())
