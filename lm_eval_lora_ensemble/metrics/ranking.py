"""Ranking documents by a score under many weightings at once, ties treated exactly.

Everything here is a function of two running sums along the sorted scores: the documents' weight and the
positives' weight. The documents are sorted once; a bootstrap resample is a weighting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray, as_binary, as_float


@dataclass(frozen=True)
class Runs:
    """Weight of each run of equal scores, in ascending order of the score, for R weightings.

    Attributes:
        weight: (R, G), all documents of the run.
        positive: (R, G), its positives.
        rate: (R, G) or (1, G), the share of positives, 0 for a run of no weight.
        weight_up_to: (R, G), running sum of ``weight``, the run included.
        positive_up_to: (R, G), running sum of ``positive``.
    """

    weight: FloatArray
    positive: FloatArray
    rate: FloatArray
    weight_up_to: FloatArray
    positive_up_to: FloatArray

    @property
    def total(self) -> FloatArray:
        """(R, 1): weight of all documents."""
        return self.weight_up_to[:, -1:]

    @property
    def positives(self) -> FloatArray:
        """(R, 1): weight of all positives."""
        return self.positive_up_to[:, -1:]

    def auroc(self) -> FloatArray:
        """(R,): P(score of a positive > score of a negative) + ½ P(equal); NaN without either class."""
        negative = self.weight - self.positive
        negatives = self.total - self.positives
        below = (self.weight_up_to - self.positive_up_to) - 0.5 * negative
        wins = np.einsum("rg,rg->r", self.positive, below)[:, None]
        return _ratio(wins, self.positives * negatives)[:, 0]

    def average_precision(self) -> FloatArray:
        """(R,): Σ over thresholds of precision × gain in recall; NaN without a positive."""
        above = self.total - self.weight_up_to + self.weight
        found = self.positives - self.positive_up_to + self.positive
        precision = found / np.where(above > 0, above, 1.0)
        area = np.einsum("rg,rg->r", self.positive, precision)[:, None]
        return _ratio(area, self.positives)[:, 0]

    def false_positive_rate(self, recall: float) -> FloatArray:
        """(R,): share of negatives above the highest threshold that finds ``recall`` of the positives."""
        above = self.total - self.weight_up_to + self.weight
        found = self.positives - self.positive_up_to + self.positive
        # found falls along the axis, so the count of thresholds that find enough is the last one's place
        last = (found >= recall * self.positives - 1e-9).sum(axis=1, keepdims=True) - 1
        wrong = np.take_along_axis(above, last, axis=1) - np.take_along_axis(found, last, axis=1)
        rate = _ratio(wrong, self.total - self.positives)
        return np.where(self.positives > 0, rate, np.nan)[:, 0]


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Divide, giving NaN where the denominator is 0: a class is missing and nothing can be said."""
    safe = np.where(denominator > 0, denominator, np.nan)
    quotient: FloatArray = numerator / safe
    return quotient


class Ranking:
    """Documents sorted by a score once.

    Args:
        score: (D,), higher means more likely positive; ±inf is allowed.
        positive: (D,), 0 or 1.

    Raises:
        EnsembleError: a NaN score, no documents, or lengths that differ.
    """

    def __init__(self, score: npt.ArrayLike, positive: npt.ArrayLike) -> None:
        values = as_float(score, "score", ndim=1)
        if np.isnan(values).any():
            raise EnsembleError(
                f"score is NaN at document {int(np.argmax(np.isnan(values)))}; it cannot be ranked"
            )
        truth = as_binary(positive, "positive", len(values))
        self._order = np.argsort(values, kind="stable")
        ordered = values[self._order]
        self._positive = truth[self._order].astype(np.float64)
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        self._starts = None if len(starts) == len(values) else starts

    def runs(self, weights: FloatArray | None = None) -> Runs:
        """Return the running sums for ``weights`` (R, D), or with R = 1 for every document once."""
        weight = np.ones((1, len(self._order))) if weights is None else np.take(weights, self._order, axis=1)
        positive = weight * self._positive
        rate = self._positive[None]
        if self._starts is not None:
            weight = np.add.reduceat(weight, self._starts, axis=1)
            positive = np.add.reduceat(positive, self._starts, axis=1)
            rate = positive / np.where(weight > 0, weight, 1.0)
        return Runs(weight, positive, rate, np.cumsum(weight, axis=1), np.cumsum(positive, axis=1))


def auroc(score: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """Return the area under the receiver operating characteristic (Hendrycks & Gimpel 2017).

    ``P(s⁺ > s⁻) + ½ P(s⁺ = s⁻)`` for a random positive and a random negative document.

    Args:
        score: (D,), higher means more likely positive.
        positive: (D,), 0 or 1.

    Returns:
        In [0, 1], 0.5 is chance; NaN if all documents are of one class.

    Raises:
        EnsembleError: a NaN score, no documents, or lengths that differ.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.auroc([0.1, 0.9], [0, 1]), metrics.auroc([0.9, 0.1], [0, 1]), metrics.auroc([0.5, 0.5], [0, 1])
        (1.0, 0.0, 0.5)
    """
    return float(Ranking(score, positive).runs().auroc()[0])


def average_precision(score: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """Return the area under the precision–recall curve as average precision, ``Σ_k (R_k − R_{k−1}) P_k``.

    Without interpolation, thresholds at distinct scores, as in scikit-learn.

    Arguments and errors as :func:`auroc`.

    Returns:
        In [0, 1]; chance is the share of positives. NaN without a positive.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.average_precision([0.1, 0.9], [0, 1]), metrics.average_precision([0.9, 0.1], [0, 1])
        (1.0, 0.5)
    """
    return float(Ranking(score, positive).runs().average_precision()[0])


def false_positive_rate_at(score: npt.ArrayLike, positive: npt.ArrayLike, recall: float = 0.95) -> float:
    """Return the false positive rate at the highest threshold that finds ``recall`` of the positives.

    With out-of-domain documents as positives this is FPR95. Some papers call in-domain the positive class;
    the numbers differ.

    Arguments and errors as :func:`auroc`; ``recall`` in (0, 1].

    Returns:
        In [0, 1], lower is better; NaN if all documents are of one class.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.false_positive_rate_at([0.1, 0.6, 0.5, 0.9], [0, 0, 1, 1], recall=0.95)
        0.5
        >>> metrics.false_positive_rate_at([0.1, 0.6, 0.5, 0.9], [0, 0, 1, 1], recall=0.5)
        0.0
    """
    if not 0 < recall <= 1:
        raise EnsembleError(f"recall is {recall}; a share in (0, 1] is needed")
    return float(Ranking(score, positive).runs().false_positive_rate(recall)[0])
