"""How far distributions differ: members from each other, or one ensemble from another.

Functions of two distributions compare ensembles, as arXiv 2402.12264 does; the ``pairwise_`` ones average
them over all pairs of members.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import special

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray, as_float, as_probabilities


def _pair(p: npt.ArrayLike, q: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    first, second = as_probabilities(p, "p"), as_probabilities(q, "q")
    if first.shape != second.shape:
        raise EnsembleError(f"p has shape {first.shape} and q {second.shape}; the same documents are needed")
    return first, second


def agreement(p: npt.ArrayLike, q: npt.ArrayLike) -> FloatArray:
    """Return ``1[argmax p = argmax q]``.

    Args:
        p: (..., C) probabilities.
        q: (..., C) probabilities of the same documents.

    Returns:
        (...,), 0 or 1; the first of equally probable choices counts as the prediction.

    Raises:
        EnsembleError: not probabilities, or shapes that differ.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.agreement([[0.9, 0.1], [0.6, 0.4]], [[0.8, 0.2], [0.3, 0.7]]).tolist()
        [1.0, 0.0]
    """
    first, second = _pair(p, q)
    same: FloatArray = (first.argmax(axis=-1) == second.argmax(axis=-1)).astype(np.float64)
    return same


def total_variation(p: npt.ArrayLike, q: npt.ArrayLike) -> FloatArray:
    """Return the total variation distance ``½ Σ_c |p(c) − q(c)|``.

    Args and errors as :func:`agreement`.

    Returns:
        (...,), in [0, 1]: the largest difference in the probability of any set of choices.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.total_variation([[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]).tolist()
        [1.0, 0.0]
    """
    first, second = _pair(p, q)
    distance: FloatArray = 0.5 * np.abs(first - second).sum(axis=-1)
    return distance


def kl_divergence(p: npt.ArrayLike, q: npt.ArrayLike) -> FloatArray:
    """Return the Kullback–Leibler divergence ``Σ_c p(c) log(p(c)/q(c))``.

    Args and errors as :func:`agreement`.

    Returns:
        (...,), nats, in [0, ∞]; infinite where q rules out what p does not.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> round(float(metrics.kl_divergence([1.0, 0.0], [0.5, 0.5])), 3)  # ln 2
        0.693
        >>> float(metrics.kl_divergence([0.5, 0.5], [1.0, 0.0]))
        inf
    """
    first, second = _pair(p, q)
    divergence: FloatArray = special.rel_entr(first, second).sum(axis=-1)
    return divergence


def _mean_over_pairs(
    p: npt.ArrayLike, measure: Callable[[FloatArray, FloatArray], FloatArray], *, ordered: bool
) -> FloatArray:
    """Average ``measure`` over pairs of different members; NaN if there is one member only."""
    members = as_probabilities(p, ndim=3)
    n, d, _ = members.shape
    total, pairs = np.zeros(d), 0
    for i in range(n):
        for j in range(n) if ordered else range(i):
            if i != j:
                total += measure(members[i], members[j])
                pairs += 1
    return total / pairs if pairs else np.full(d, np.nan)


def pairwise_agreement(p: npt.ArrayLike) -> FloatArray:
    """Return the share of pairs of members that predict the same choice.

    Args:
        p: (N, D, C) members' probabilities.

    Returns:
        (D,), in [0, 1]; NaN for one member, which has nobody to agree with.

    Raises:
        EnsembleError: not probabilities.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> members = [[[0.9, 0.1]], [[0.8, 0.2]], [[0.3, 0.7]]]  # one of three pairs agrees
        >>> round(float(metrics.pairwise_agreement(members)[0]), 3)
        0.333
    """
    return _mean_over_pairs(p, agreement, ordered=False)


def pairwise_total_variation(p: npt.ArrayLike) -> FloatArray:
    """Return the mean total variation distance between two members.

    Args:
        p: (N, D, C) members' probabilities.

    Returns:
        (D,), in [0, 1]; NaN for one member.

    Raises:
        EnsembleError: not probabilities.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.pairwise_total_variation([[[1.0, 0.0]], [[0.5, 0.5]]]).tolist()
        [0.5]
    """
    return _mean_over_pairs(p, total_variation, ordered=False)


def pairwise_kl(p: npt.ArrayLike) -> FloatArray:
    """Return the mean Kullback–Leibler divergence over ordered pairs of members.

    Args:
        p: (N, D, C) members' probabilities.

    Returns:
        (D,), nats, in [0, ∞]; NaN for one member.

    Raises:
        EnsembleError: not probabilities.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> members = [[[0.75, 0.25]], [[0.25, 0.75]]]  # ½ ln 3, either way round
        >>> round(float(metrics.pairwise_kl(members)[0]), 3)
        0.549
    """
    return _mean_over_pairs(p, kl_divergence, ordered=True)


def variation_ratio(p: npt.ArrayLike) -> FloatArray:
    """Return the share of members that do not vote with the majority (Freeman 1965).

    ``1 − max_c #{m : argmax p_m = c} / N``.

    Args:
        p: (N, D, C) members' probabilities.

    Returns:
        (D,), in [0, 1 − 1/N]; 0 for one member.

    Raises:
        EnsembleError: not probabilities.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> members = [[[0.9, 0.1]], [[0.8, 0.2]], [[0.7, 0.3]], [[0.3, 0.7]]]  # one of four dissents
        >>> metrics.variation_ratio(members).tolist()
        [0.25]
    """
    members = as_probabilities(p, ndim=3)
    votes = members.argmax(axis=2)
    counts = (votes[:, :, None] == np.arange(members.shape[2])).sum(axis=0)
    ratio: FloatArray = 1.0 - counts.max(axis=1) / members.shape[0]
    return ratio


def normalised(entropies: npt.ArrayLike, counts: npt.ArrayLike) -> FloatArray:
    """Divide entropies, or mutual information, by the most they could be, ``ln C_d``.

    Makes documents with different numbers of choices comparable.

    Args:
        entropies: (D,), nats.
        counts: (D,) number of choices of each document, or one number.

    Returns:
        (D,), in [0, 1].

    Raises:
        EnsembleError: a document with fewer than two choices.
    """
    values = as_float(entropies, "entropies")
    sizes = as_float(counts, "counts")
    if (sizes < 2).any():
        raise EnsembleError("a document with fewer than two choices has no entropy to normalise")
    shares: FloatArray = values / np.log(sizes)
    return shares
