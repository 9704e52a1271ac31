"""Proper scoring rules: what a distribution costs when the gold answer is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray, as_is_gold, as_probabilities


def negative_loglikelihood(p: npt.ArrayLike, gold: npt.ArrayLike) -> FloatArray:
    """Return each document's ``−log P_G``, the logarithmic score of the mass P_G on its gold choices.

    Args:
        p: (D, C) probabilities over the choices.
        gold: (D,) index of the right choice, or (D, C) booleans where several may be.

    Returns:
        (D,), nats, in [0, ∞], lower is better. Infinite where the gold answer was held impossible.

    Raises:
        EnsembleError: not probabilities, or a gold outside the choices.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.negative_loglikelihood([[0.5, 0.5], [1.0, 0.0]], [0, 0]).round(3).tolist()  # ln 2, 0
        [0.693, 0.0]
    """
    probabilities = as_probabilities(p, ndim=2)
    chosen = (probabilities * _is_gold(gold, probabilities)).sum(axis=1)
    with np.errstate(divide="ignore"):
        # A probability of 1 + 1e-16 must not give a negative score, nor one of 1 the value −0.
        loss: FloatArray = 0.0 - np.log(np.minimum(chosen, 1.0))
    return loss


def brier_score(p: npt.ArrayLike, gold: npt.ArrayLike) -> FloatArray:
    """Return each document's ``(1 − P_G)² + Σ_{c ∉ G} p(c)²``, the quadratic score (Brier 1950).

    P_G is the mass on the gold choices G: for one of them the sum of squares over choices, as Brier defined it;
    scikit-learn's ``brier_score_loss`` halves that for two classes. With several golds it is the score of the event "a
    gold choice" against each other choice, and proper for it.

    Args:
        p: (D, C) probabilities over the choices.
        gold: (D,) index of the right choice, or (D, C) booleans where several may be.

    Returns:
        (D,), in [0, 2], lower is better.

    Raises:
        EnsembleError: not probabilities, or a gold outside the choices.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.brier_score([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], [0, 0, 0]).tolist()
        [0.0, 0.5, 2.0]
    """
    probabilities = as_probabilities(p, ndim=2)
    is_gold = _is_gold(gold, probabilities)
    mass = (probabilities * is_gold).sum(axis=1)
    others: FloatArray = np.square(np.where(is_gold, 0.0, probabilities)).sum(axis=1)
    return np.square(1.0 - mass) + others


def _is_gold(gold: npt.ArrayLike, probabilities: FloatArray) -> BoolArray:
    d, c = probabilities.shape
    return as_is_gold(gold, np.full(d, c), c)
