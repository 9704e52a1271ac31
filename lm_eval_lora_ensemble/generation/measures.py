"""How sure an ensemble is of a text: of each token, and of the whole.

Token measures are those of the members averaged *equally*, whatever weights the text was decoded with, so that none is
below zero and none vanishes as one member takes all the weight. Sources: Malinin & Gales 2021 (arXiv 2002.07650) for
total and data uncertainty, mutual information and reverse mutual information.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.strings import quantities


class TokenMeasures(NamedTuple):
    """Of B next-token distributions, each [B], in nats.

    Attributes:
        total: H[p̄], the entropy of the members' mean, 0 to log V.
        data: (1/N) Σ_m H[p_m], the mean of their entropies, 0 to log V.
    """

    total: torch.Tensor
    data: torch.Tensor


def token_measures(log_probs: torch.Tensor) -> TokenMeasures:
    """Measure next-token distributions.

    Args:
        log_probs: float32 [N, B, V]; −∞ where a member rules a token out.

    Example:
        >>> import torch
        >>> sure = torch.log(torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]))
        >>> found = token_measures(sure)
        >>> [round(float(value[0]), 4) for value in found]
        [0.6931, 0.3251]
    """
    probs = log_probs.exp()
    # 0 · log 0 is 0
    data = -torch.linalg.vecdot(probs, log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).mean(dim=0)
    if len(log_probs) == 1:
        return TokenMeasures(data, data)
    return TokenMeasures(torch.special.entr(probs.mean(dim=0)).sum(dim=-1), data)


def effective_members(weights: torch.Tensor) -> torch.Tensor:
    """Return 1 / Σ_m w_m², [B], 1 to N: how many members have a say (weights [N, B] of log w)."""
    return torch.exp(-torch.logsumexp(2 * weights, dim=0))


def answer_measures(
    member_log_probs: FloatArray, log_probs: FloatArray, total: FloatArray, data: FloatArray
) -> Mapping[str, float]:
    """Measure an answer of L tokens.

    Args:
        member_log_probs: (N, L), log p_m of each token.
        log_probs: (L,), of the distribution the text was decoded from, before temperature and the like.
        total: (L,), from :func:`token_measures`.
        data: (L,), likewise.

    Returns:
        In nats; all NaN where L is 0.

        * ``mean_token_entropy``: mean of ``total``, ≥ 0.
        * ``mean_token_mutual_information``: mean of ``total − data``, ≥ 0; 0 for N = 1.
        * ``reverse_mutual_information``: ``(log-mean-exp s_m − mean s_m) / L`` with s_m = log p_m(answer), ≥ 0.
        * ``answer_nll``: ``−log-mean-exp s_m``, minus the log-probability of the whole answer under the mixture.
        * ``normalised_nll``: ``answer_nll / L``.
        * ``max_token_nll``: minus the least of ``log_probs``.
    """
    length = member_log_probs.shape[1]
    if not length:
        return dict.fromkeys(ANSWER_MEASURES, float("nan"))
    of_string = {
        name: float(value[0])
        for name, value in quantities(member_log_probs.sum(axis=1, dtype=np.float64)[:, None]).items()
    }
    return {
        "mean_token_entropy": float(np.mean(total)),
        "mean_token_mutual_information": float(np.mean(np.maximum(total - data, 0.0))),
        "reverse_mutual_information": max(of_string["reverse_mutual_information"], 0.0) / length,
        "answer_nll": of_string["nll"],
        "normalised_nll": of_string["nll"] / length,
        "max_token_nll": float(-np.min(log_probs)),
    }


ANSWER_MEASURES = (
    "mean_token_entropy",
    "mean_token_mutual_information",
    "reverse_mutual_information",
    "answer_nll",
    "normalised_nll",
    "max_token_nll",
)
