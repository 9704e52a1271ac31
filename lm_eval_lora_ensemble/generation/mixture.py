"""The mixture's next-token distribution, and the members' weights in it."""

from __future__ import annotations

from typing import Literal, get_args

import torch

GenerationAverage = Literal["posterior", "equal"]
GENERATION_AVERAGES: tuple[str, ...] = get_args(GenerationAverage)


def log_weights(scores: torch.Tensor, average: GenerationAverage) -> torch.Tensor:
    """Return the members' weights in the next token's distribution, float64 [N, B] of log w.

    Args:
        scores: float64 [N, B], each member's loglikelihood of the text generated so far, in nats.
        average: ``posterior`` for w_m ∝ p_m(text so far), which makes the chain rule give the Bayesian model average
            ``(1/N) Σ_m p_m(text)`` (arXiv 2402.12264, eq. 2); ``equal`` for 1/N at every token, as in machine
            translation's ensembles.
    """
    if average == "equal":
        scores = torch.zeros_like(scores)
    return torch.log_softmax(scores, dim=0)


def log_mixture(log_probs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return ``log Σ_m w_m p_m``, float32 [B, V].

    Args:
        log_probs: float32 [N, B, V], the members' next-token log-probabilities.
        weights: [N, B] of log w, from :func:`log_weights`.
    """
    if len(log_probs) == 1:  # the member itself, to the last bit
        return log_probs[0]
    return torch.logsumexp(log_probs + weights.to(log_probs.dtype)[:, :, None], dim=0)
