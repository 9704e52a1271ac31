"""From the choices' loglikelihoods to probabilities, and from members to their ensemble."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import (
    SUM_TOLERANCE,
    FloatArray,
    as_float,
    as_probabilities,
    first_index,
)


def log_choice_probabilities(loglikelihoods: npt.ArrayLike) -> FloatArray:
    """Normalise loglikelihoods over the choices: ``log p(c) = l(c) − log Σ_c' exp l(c')``.

    Args:
        loglikelihoods: (..., C), nats. −inf marks a choice that the document lacks, or one that the model
            holds impossible; its probability is exactly 0.

    Returns:
        (..., C) float64, nats, in [−inf, 0].

    Raises:
        EnsembleError: a NaN, a +inf, or a document all of whose choices are −inf.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.log_choice_probabilities([-7.0, -7.0]).round(3).tolist()  # −ln 2
        [-0.693, -0.693]
    """
    values = as_float(loglikelihoods, "loglikelihoods")
    if values.ndim == 0:
        raise EnsembleError("loglikelihoods is one number; an axis of choices is needed")
    bad = np.isnan(values) | (values == np.inf)
    if bad.any():
        index = first_index(bad)
        raise EnsembleError(
            f"loglikelihood is {values[index]} at index {index}; "
            "score again in float32 or bfloat16 if the model ran in float16"
        )
    peak = values.max(axis=-1, keepdims=True)
    if np.isneginf(peak).any():
        index = first_index(np.isneginf(peak[..., 0]))
        raise EnsembleError(f"every choice has loglikelihood -inf at index {index}: no distribution follows")
    shifted = values - peak
    normalised: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def choice_probabilities(loglikelihoods: npt.ArrayLike) -> FloatArray:
    """Return the softmax of the loglikelihoods over the choices, in float64.

    Args:
        loglikelihoods: (..., C), nats; −inf gives probability 0.

    Returns:
        (..., C), each row sums to 1.

    Raises:
        EnsembleError: as :func:`log_choice_probabilities`.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.choice_probabilities([-7.0, -7.0, float("-inf")]).round(3).tolist()
        [0.5, 0.5, 0.0]
    """
    probabilities: FloatArray = np.exp(log_choice_probabilities(loglikelihoods))
    return probabilities


def with_other_class(loglikelihoods: npt.ArrayLike) -> FloatArray:
    """Return the probabilities of the answer letters and, last, of everything else.

    ``p(c) = exp l(c)`` as it stands, not renormalised, and ``p(other) = 1 − Σ_c p(c)``: what the model
    would rather say than any letter (Balabanov & Linander, arXiv 2402.12264). The letters have to be
    single tokens whose loglikelihoods are taken over the whole vocabulary.

    Args:
        loglikelihoods: (..., C), nats.

    Returns:
        (..., C + 1), each row sums to 1.

    Raises:
        EnsembleError: a NaN, or letters that sum to more than 1 + 1e-6, as scores that are not single-token
            log-probabilities do.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> from math import log
        >>> metrics.with_other_class([log(0.5), log(0.3)]).round(3).tolist()
        [0.5, 0.3, 0.2]
    """
    values = as_float(loglikelihoods, "loglikelihoods")
    if values.ndim == 0:
        raise EnsembleError("loglikelihoods is one number; an axis of choices is needed")
    if np.isnan(values).any():
        raise EnsembleError(f"loglikelihood is nan at index {first_index(np.isnan(values))}")
    letters = np.exp(np.minimum(values, 1.0))
    other = 1.0 - letters.sum(axis=-1, keepdims=True)
    if (other < -SUM_TOLERANCE).any():
        index = first_index(other[..., 0] < -SUM_TOLERANCE)
        raise EnsembleError(
            f"the choices' probabilities sum to {1 - other[index][0]:.6g} at index {index}, more than 1; "
            "the class 'other' needs single-token choices"
        )
    probabilities: FloatArray = np.concatenate([letters, np.maximum(other, 0.0)], axis=-1)
    return probabilities


def ensemble_probabilities(members: npt.ArrayLike) -> FloatArray:
    """Return the ensemble's distribution ``p̄(c) = (1/N) Σ_m p_m(c)``.

    The Bayesian model average with equal weights, whatever the backend's ``average`` argument is: that one
    averages loglikelihoods of whole continuations, this one distributions over choices. With continuations
    of several tokens the two can rank the choices differently.

    Args:
        members: (N, ..., C) probabilities.

    Returns:
        (..., C).

    Raises:
        EnsembleError: not probabilities over at least two choices.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> metrics.ensemble_probabilities([[1.0, 0.0], [0.5, 0.5]]).tolist()
        [0.75, 0.25]
    """
    probabilities = as_probabilities(members, "members")
    if probabilities.ndim < 2:
        raise EnsembleError(f"members has shape {probabilities.shape}; (N, ..., C) is needed")
    mean: FloatArray = probabilities.mean(axis=0)
    return mean
