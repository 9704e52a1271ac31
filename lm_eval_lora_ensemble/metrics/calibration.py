"""Calibration: does an answer given with confidence 0.8 turn out right eight times in ten?

All errors here are computed from one set of sums per bin, so that the point estimate and every bootstrap
resample go through the same lines. Confidence is max_c p̄(c) and correctness is argmax_c p̄(c) = gold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray, IntArray, as_binary, as_float

DEFAULT_BINS = 15
"""The field's most common count (Guo et al. 2017); 10 and 20 occur too, so a value needs its bin count."""

Binning = Literal["width", "mass"]
MOST_BINS = 100_000
"""More bins than documents say nothing, and so many would fill the memory."""


def _checked(confidence: npt.ArrayLike, correct: npt.ArrayLike) -> tuple[FloatArray, BoolArray]:
    """Return both as arrays of one length, or say what is wrong with them."""
    c = as_float(confidence, "confidence", ndim=1)
    if not ((c >= 0) & (c <= 1 + 1e-6)).all():
        raise EnsembleError("confidence holds a NaN or a value outside [0, 1]")
    return np.minimum(c, 1.0), as_binary(correct, "correct", len(c))


def bin_edges(confidence: FloatArray, bins: int, binning: Binning = "width") -> FloatArray:
    """Return the ascending edges of right-closed bins; the first is 0 and the last is 1.

    ``width`` gives equal intervals. ``mass`` puts the inner edges at the sample's k/B quantiles (the value
    of rank ⌈kD/B⌉), so bins hold equally many documents; equal confidences are never torn apart, and
    where that empties a bin, there are fewer bins.

    Raises:
        EnsembleError: no whole number of bins from 1 to ``MOST_BINS``, or an unknown ``binning``.
    """
    if bins < 1:
        raise EnsembleError(f"bins is {bins}; at least one bin is needed")
    if bins != int(bins) or bins > MOST_BINS:
        raise EnsembleError(f"bins is {bins}; give a whole number, at most {MOST_BINS:,}")
    if binning not in get_args(Binning):
        raise EnsembleError(f"binning is {binning!r}; use one of {', '.join(get_args(Binning))}")
    if binning == "width":
        return np.linspace(0.0, 1.0, bins + 1)
    ranks = np.ceil(np.arange(1, bins) * len(confidence) / bins).astype(int)
    inner = np.sort(confidence)[np.maximum(ranks, 1) - 1]
    return np.unique(np.concatenate([[0.0], inner[(inner > 0) & (inner < 1)], [1.0]]))


@dataclass(frozen=True)
class BinSums:
    """Sums over the documents of each bin, for R weightings of the documents at once.

    Attributes:
        count: (R, B), the documents' total weight.
        confidence: (R, B), Σ w · confidence.
        correct: (R, B), Σ w · correct.
    """

    count: FloatArray
    confidence: FloatArray
    correct: FloatArray

    @property
    def gap(self) -> FloatArray:
        """(R, B): mean confidence minus accuracy, 0 in an empty bin, where its share is 0 as well."""
        weight = np.where(self.count > 0, self.count, 1.0)
        gap: FloatArray = (self.confidence - self.correct) / weight
        return gap

    @property
    def share(self) -> FloatArray:
        """(R, B): the bin's share of all documents."""
        share: FloatArray = self.count / self.count.sum(axis=1, keepdims=True)
        return share

    def l1(self) -> FloatArray:
        """(R,): ``Σ_b share_b · |gap_b|``."""
        total: FloatArray = (self.share * np.abs(self.gap)).sum(axis=1)
        return total

    def l2(self) -> FloatArray:
        """(R,): ``√(Σ_b share_b · gap_b²)``."""
        root: FloatArray = np.sqrt((self.share * np.square(self.gap)).sum(axis=1))
        return root

    def largest(self) -> FloatArray:
        """(R,): ``max_b |gap_b|`` over the bins that hold a document."""
        peak: FloatArray = np.abs(self.gap).max(axis=1)
        return peak

    def squared_debiased(self) -> FloatArray:
        """(R,): the squared l2 error less what chance alone puts into it; see the module's functions."""
        n = np.maximum(self.count, 2.0)
        accuracy = self.correct / np.where(self.count > 0, self.count, 1.0)
        excess = np.square(self.gap) - accuracy * (1 - accuracy) / (n - 1)
        total: FloatArray = (self.share * np.where(self.count >= 2, excess, 0.0)).sum(axis=1)
        return total


class CalibrationBins:
    """Confidences sorted into bins once, to be summed under any number of weightings.

    Args:
        confidence: (D,), in [0, 1].
        correct: (D,), 0 or 1.
        bins: how many bins.
        binning: ``width`` or ``mass``; see :func:`bin_edges`. The edges come from the sample as it is and
            stay put under resampling.
    """

    def __init__(
        self,
        confidence: npt.ArrayLike,
        correct: npt.ArrayLike,
        bins: int = DEFAULT_BINS,
        binning: Binning = "width",
    ) -> None:
        c, right = _checked(confidence, correct)
        self.edges = bin_edges(c, bins, binning)
        # A confidence of exactly 0 lies in no right-closed bin; it belongs to the first.
        self.index: IntArray = np.maximum(np.searchsorted(self.edges, c, side="left") - 1, 0)
        one_hot = np.zeros((len(c), len(self.edges) - 1))
        one_hot[np.arange(len(c)), self.index] = 1.0
        self._columns = np.concatenate(
            [one_hot, one_hot * c[:, None], one_hot * right[:, None].astype(np.float64)], axis=1
        )

    def sums(self, weights: FloatArray | None = None) -> BinSums:
        """Return the sums for ``weights`` (R, D), or with R = 1 for every document once."""
        totals = self._columns.sum(axis=0, keepdims=True) if weights is None else weights @ self._columns
        return BinSums(*np.split(totals, 3, axis=1))


def expected_calibration_error(
    confidence: npt.ArrayLike, correct: npt.ArrayLike, bins: int = DEFAULT_BINS, *, binning: Binning = "width"
) -> float:
    """Return ECE ``= Σ_b (n_b/n) |acc_b − conf_b|`` (Naeini et al. 2015; Guo et al. 2017).

    Bins are right-closed over (0, 1]. torchmetrics' ``norm='l1'`` is the same but for confidences exactly
    on an edge: it closes bins on the left and gives confidence 1 a bin of its own.

    Args:
        confidence: (D,), the probability of the chosen answer, in [0, 1].
        correct: (D,), whether that answer is right, 0 or 1.
        bins: number of bins; state it with the value.
        binning: ``width`` for equal widths, ``mass`` for equal numbers of documents (Nixon et al. 2019).

    Returns:
        In [0, 1], lower is better. Biased upwards for small n: a calibrated model does not score 0.

    Raises:
        EnsembleError: no documents, lengths that differ, values outside their range, ``bins`` < 1.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> round(metrics.expected_calibration_error([0.9, 0.6], [True, False]), 3)  # (0.1 + 0.6) / 2
        0.35
    """
    return float(CalibrationBins(confidence, correct, bins, binning).sums().l1()[0])


def rms_calibration_error(
    confidence: npt.ArrayLike, correct: npt.ArrayLike, bins: int = DEFAULT_BINS, *, binning: Binning = "width"
) -> float:
    """Return the root-mean-square calibration error ``√(Σ_b (n_b/n) (acc_b − conf_b)²)``.

    Of Hendrycks et al. 2019. Arguments, bins and errors as :func:`expected_calibration_error`;
    torchmetrics' ``norm='l2'`` away from bin edges.

    Returns:
        In [0, 1], lower is better; never below ECE of the same bins.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> round(metrics.rms_calibration_error([0.9, 0.7], [True, False]), 3)  # √((0.01 + 0.49) / 2)
        0.5
    """
    return float(CalibrationBins(confidence, correct, bins, binning).sums().l2()[0])


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability diagram; ``confidence``, ``accuracy`` and the interval are NaN if n = 0."""

    lower: float
    upper: float
    n: int
    confidence: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


def reliability_table(
    confidence: npt.ArrayLike,
    correct: npt.ArrayLike,
    bins: int = DEFAULT_BINS,
    *,
    binning: Binning = "width",
    level: float = 0.95,
) -> list[ReliabilityBin]:
    """Return what a reliability diagram shows, bin by bin (DeGroot & Fienberg 1983).

    The interval is Wilson's (1927) for the bin's accuracy: it stays inside [0, 1] and does not collapse when
    all of a bin's answers are right.

    Args:
        confidence: (D,), in [0, 1].
        correct: (D,), 0 or 1.
        bins: number of bins.
        binning: ``width`` or ``mass``.
        level: two-sided coverage of the interval, in (0, 1).

    Returns:
        One row a bin, in ascending order, empty bins included.

    Raises:
        EnsembleError: as :func:`expected_calibration_error`, or ``level`` outside (0, 1).

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> unsure, sure = metrics.reliability_table([0.9, 0.7], [True, False], bins=2)
        >>> unsure.n, sure.n, round(sure.confidence, 3), sure.accuracy
        (0, 2, 0.8, 0.5)
        >>> round(sure.accuracy_low, 3), round(sure.accuracy_high, 3)
        (0.095, 0.905)
    """
    from scipy.stats import norm

    if not 0 < level < 1:
        raise EnsembleError(f"level is {level}; a coverage between 0 and 1 is needed")
    z = float(norm.ppf(0.5 + level / 2))
    binned = CalibrationBins(confidence, correct, bins, binning)
    sums = binned.sums()
    rows = []
    for b, n in enumerate(sums.count[0]):
        if n == 0:
            mean = accuracy = low = high = float("nan")
        else:
            mean, accuracy = float(sums.confidence[0, b] / n), float(sums.correct[0, b] / n)
            centre = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
            reach = z / (1 + z * z / n) * np.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
            low, high = max(0.0, float(centre - reach)), min(1.0, float(centre + reach))
        edges = float(binned.edges[b]), float(binned.edges[b + 1])
        rows.append(ReliabilityBin(*edges, int(n), mean, accuracy, low, high))
    return rows


def maximum_calibration_error(
    confidence: npt.ArrayLike, correct: npt.ArrayLike, bins: int = DEFAULT_BINS, *, binning: Binning = "width"
) -> float:
    """Return MCE ``= max_b |acc_b − conf_b|`` over the bins that hold a document (Naeini et al. 2015).

    Arguments and errors as :func:`expected_calibration_error`; torchmetrics' ``norm='max'``.

    Returns:
        In [0, 1], lower is better. One document in a bin can set it: read it with the reliability table.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> round(metrics.maximum_calibration_error([0.9, 0.6], [True, False]), 3)
        0.6
    """
    return float(CalibrationBins(confidence, correct, bins, binning).sums().largest()[0])


def debiased_squared_calibration_error(
    confidence: npt.ArrayLike, correct: npt.ArrayLike, bins: int = DEFAULT_BINS, *, binning: Binning = "width"
) -> float:
    """Return the squared calibration error less its plug-in bias (Bröcker 2012; Kumar et al. 2019).

    ``Σ_b (n_b/n) [(acc_b − conf_b)² − acc_b (1 − acc_b)/(n_b − 1)]``: the second term estimates the variance
    of acc_b, which the square of a sample mean contains. A bin with one document has no such estimate and
    adds 0.

    Arguments and errors as :func:`expected_calibration_error`.

    Returns:
        In [−0.25, 1], lower is better. Negative means: not distinguishable from calibrated. It is left
        squared and signed, since taking a root would need it clamped and so biased again.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.debiased_squared_calibration_error([1.0, 1.0], [False, False])
        1.0
        >>> metrics.debiased_squared_calibration_error([0.5, 0.5], [True, False])
        -0.25
    """
    return float(CalibrationBins(confidence, correct, bins, binning).sums().squared_debiased()[0])


def confidence_gap(confidence: npt.ArrayLike, correct: npt.ArrayLike) -> float:
    """Return mean confidence minus accuracy.

    Returns:
        In [−1, 1]: positive for an over-confident model, negative for an under-confident one. ECE is never
        less than its size.

    Raises:
        EnsembleError: as :func:`expected_calibration_error`.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> round(metrics.confidence_gap([0.9, 0.7], [True, False]), 3)  # 0.8 − 0.5
        0.3
    """
    c, right = _checked(confidence, correct)
    return float(c.mean() - right.mean())
