"""Calibration of every choice's probability, not of the chosen one's only.

A "class" is the choice's position: (a), (b), … . Documents that lack a position are left out of its class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray, as_counts, as_is_gold, as_probabilities
from lm_eval_lora_ensemble.metrics.calibration import DEFAULT_BINS, BinSums, CalibrationBins


class ClasswiseBins:
    """One set of calibration bins for each choice position.

    Args:
        p: (D, C) probabilities.
        gold: (D,) index of the right choice, or (D, C) booleans where several may be.
        bins: number of equal-width bins.
        counts: (D,) number of choices of each document; C everywhere if left out.
    """

    def __init__(
        self,
        p: npt.ArrayLike,
        gold: npt.ArrayLike,
        bins: int = DEFAULT_BINS,
        counts: npt.ArrayLike | None = None,
    ) -> None:
        probabilities = as_probabilities(p, ndim=2)
        d, c = probabilities.shape
        sizes = as_counts(counts, d, c)
        beyond = (probabilities * (np.arange(c) >= sizes[:, None])).any(axis=1)
        if beyond.any():
            index = int(np.argmax(beyond))
            raise EnsembleError(f"document {index} has {sizes[index]} choices and probability beyond them")
        is_gold = as_is_gold(gold, sizes, c)
        self._classes = []
        for k in range(int(sizes.max())):
            has = np.flatnonzero(sizes > k)
            column = CalibrationBins(probabilities[has, k], is_gold[has, k], bins)
            self._classes.append((None if len(has) == d else has, column))

    def sums(self, weights: FloatArray) -> list[BinSums]:
        """Return the sums of every class for ``weights`` (R, D)."""
        return [column.sums(weights if has is None else weights[:, has]) for has, column in self._classes]


def classwise_calibration_error(
    p: npt.ArrayLike,
    gold: npt.ArrayLike,
    bins: int = DEFAULT_BINS,
    *,
    counts: npt.ArrayLike | None = None,
) -> float:
    """Return classwise ECE ``= (1/C) Σ_c Σ_b (n_bc/n_c) |freq_bc − p_bc|`` (Kull et al. 2019).

    Args:
        p: (D, C) probabilities.
        gold: (D,) index of the right choice, or (D, C) booleans where several may be.
        bins: number of equal-width, right-closed bins.
        counts: (D,) number of choices of each document, for ragged tasks.

    Returns:
        In [0, 1], lower is better. Each position weighs the same, however few documents have it.

    Raises:
        EnsembleError: not probabilities, or a gold outside the choices.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.classwise_calibration_error([[1.0, 0.0], [1.0, 0.0]], [0, 0])
        0.0
        >>> metrics.classwise_calibration_error([[1.0, 0.0], [1.0, 0.0]], [0, 1])
        0.5
    """
    columns = ClasswiseBins(p, gold, bins, counts)
    return float(classwise_l1(columns.sums(np.ones((1, len(np.asarray(gold))))))[0])


def classwise_l1(sums: list[BinSums]) -> FloatArray:
    """Return (R,) classwise ECE of the classes that hold a document under each weighting."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nanmean([s.l1() for s in sums], axis=0), dtype=np.float64)


@dataclass(frozen=True)
class BrierDecomposition:
    """``brier = reliability − resolution + uncertainty + within_bin``; each (R,) or a float.

    Attributes:
        reliability: squared distance of probability and frequency, ≥ 0, lower is better.
        resolution: squared distance of the bins' frequencies from the base rate, ≥ 0, higher is better.
        uncertainty: variance of the base rate, a property of the data.
        within_bin: what binning loses: spread of p in a bin less twice its covariance with the outcome.
    """

    reliability: FloatArray
    resolution: FloatArray
    uncertainty: FloatArray
    within_bin: FloatArray


def decompose(sums: list[BinSums], brier: FloatArray, *, debiased: bool = False) -> BrierDecomposition:
    """Decompose the weighted mean Brier scores (R,); see :func:`brier_decomposition`."""
    documents = sums[0].count.sum(axis=1)
    reliability, resolution, uncertainty = (np.zeros(len(documents)) for _ in range(3))
    for s in sums:
        n = s.count.sum(axis=1)
        share = n / documents
        filled = np.where(s.count > 0, s.count, 1.0)
        frequency = s.correct / filled
        base = s.correct.sum(axis=1) / np.where(n > 0, n, 1.0)
        weight = s.count / np.where(n > 0, n, 1.0)[:, None]
        rel = (weight * np.square(s.gap)).sum(axis=1)
        res = (weight * np.square(frequency - base[:, None])).sum(axis=1)
        unc = base * (1 - base)
        if debiased:
            # A bin with one document has no estimate of its own variance; its plug-in variance is 0.
            spread = frequency * (1 - frequency) / (np.maximum(s.count, 2.0) - 1)
            noise = (weight * spread).sum(axis=1)
            correction = unc / (np.maximum(n, 2.0) - 1)
            rel, res, unc = rel - noise, res - noise + correction, unc + correction
        reliability += share * rel
        resolution += share * res
        uncertainty += share * unc
    return BrierDecomposition(
        reliability, resolution, uncertainty, brier - (reliability - resolution + uncertainty)
    )


def brier_decomposition(
    p: npt.ArrayLike,
    gold: npt.ArrayLike,
    bins: int = DEFAULT_BINS,
    *,
    counts: npt.ArrayLike | None = None,
    debiased: bool = False,
) -> BrierDecomposition:
    """Split the Brier score into reliability, resolution and uncertainty (Murphy 1973; Bröcker 2009).

    Per choice c and bin b of p(c), with n_b documents, mean probability p_b, frequency o_b and base rate o:
    ``REL = Σ_b (n_b/n)(p_b − o_b)²``, ``RES = Σ_b (n_b/n)(o_b − o)²``, ``UNC = o(1 − o)``, summed over the
    choices. Probabilities differ within a bin, so a remainder is left (Stephenson et al. 2008); it is given.

    Args:
        p: (D, C) probabilities.
        gold: (D,) index of the right choice, or (D, C) booleans where several may be.
        bins: number of equal-width, right-closed bins.
        counts: (D,) number of choices of each document, for ragged tasks.
        debiased: remove the plug-in bias (Bröcker 2012; Ferro & Fricker 2012):
            ``REL − v``, ``RES − v + u``, ``UNC + u`` with ``v = Σ_b (n_b/n) o_b(1 − o_b)/(n_b − 1)`` and
            ``u = UNC/(n − 1)``. REL and RES can then be negative.

    Returns:
        Floats (as arrays of shape ()) that add up to the mean Brier score.

    Raises:
        EnsembleError: not probabilities, a gold outside the choices, or several of them.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> parts = metrics.brier_decomposition([[1.0, 0.0], [1.0, 0.0]], [0, 1])
        >>> float(parts.reliability), float(parts.resolution), float(parts.uncertainty)
        (0.5, 0.0, 0.5)
    """
    from lm_eval_lora_ensemble.metrics.proper_scores import brier_score

    if np.ndim(gold) == 2 and (np.sum(gold, axis=1) > 1).any():
        raise EnsembleError("the Brier score's decomposition is defined for one gold choice a document")
    one = np.ones((1, len(np.asarray(gold))))
    parts = decompose(
        ClasswiseBins(p, gold, bins, counts).sums(one),
        brier_score(p, gold).mean(keepdims=True),
        debiased=debiased,
    )
    return BrierDecomposition(
        *(part[0] for part in (parts.reliability, parts.resolution, parts.uncertainty, parts.within_bin))
    )
