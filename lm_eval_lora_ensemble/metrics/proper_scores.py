"""Proper scoring rules: what a distribution costs when the gold answer is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.metrics.arrays import FloatArray, as_gold, as_probabilities


def negative_loglikelihood(p: npt.ArrayLike, gold: npt.ArrayLike) -> FloatArray:
    """Return each document's ``−log p(gold)``, the logarithmic score.

    Args:
        p: (D, C) probabilities over the choices.
        gold: (D,) index of the correct choice.

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
    index = as_gold(gold, *probabilities.shape)
    chosen = probabilities[np.arange(len(index)), index]
    with np.errstate(divide="ignore"):
        # A probability of 1 + 1e-16 must not give a negative score, nor one of 1 the value −0.
        loss: FloatArray = 0.0 - np.log(np.minimum(chosen, 1.0))
    return loss


def brier_score(p: npt.ArrayLike, gold: npt.ArrayLike) -> FloatArray:
    """Return each document's ``Σ_c (p(c) − 1[c = gold])²``, the quadratic score (Brier 1950).

    The sum over choices, as Brier defined it; scikit-learn's ``brier_score_loss`` halves it for two classes.

    Args:
        p: (D, C) probabilities over the choices.
        gold: (D,) index of the correct choice.

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
    index = as_gold(gold, *probabilities.shape)
    error = probabilities.copy()
    error[np.arange(len(index)), index] -= 1.0
    squares: FloatArray = np.square(error).sum(axis=1)
    return squares
