"""From a batch's logits to each member's loss."""

from __future__ import annotations

import torch
from lm_eval_lora_ensemble.train.layout import Batch


def loglikelihoods(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the loglikelihood of every choice, float32 [N, D, C] in nats; padding choices are 0.

    Args:
        logits: [P, V] at the batch's scored outputs.
        batch: the batch they belong to.
    """
    logits = logits.float()
    tokens = logits[batch.output, batch.target] - logits.logsumexp(-1)[batch.output]
    return (tokens * batch.weight).sum(-1)


def document_losses(lls: torch.Tensor, batch: Batch, objective: str) -> torch.Tensor:
    """Return each document's loss [N, D], in nats.

    ``answer``: −log p(gold continuation | prompt), summed over its tokens over the full vocabulary. With a
    one-letter answer it is the cross-entropy at the letter (arXiv 2402.12264).
    ``choices``: −log of the gold choices' share of the softmax over the choices' loglikelihoods.

    Args:
        lls: [N, D, C] from :func:`loglikelihoods`.
        batch: the batch they belong to; for ``answer`` its only choice is the gold one.
        objective: ``answer`` or ``choices``.
    """
    if objective == "answer":
        return -lls[..., 0]
    choices = lls.masked_fill(~batch.is_choice, -torch.inf)
    gold = lls.masked_fill(~batch.is_gold, -torch.inf)
    return choices.logsumexp(-1) - gold.logsumexp(-1)


def squared_norm_of_product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return ‖B·A‖²_F without forming B·A, as Σ (BᵀB) ∘ (A·Aᵀ).

    Args:
        A: [..., r, in].
        B: [..., out, r].

    Returns:
        Shape [...]; no alpha / r factor.
    """
    return ((B.mT @ B) * (A @ A.mT)).sum((-2, -1))
