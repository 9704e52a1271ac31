"""From a batch to each member's loss: logits where a token is scored, loglikelihoods, losses, penalties."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lm_eval_lora_ensemble.train.layout import Batch
from lm_eval_lora_ensemble.train.stacked import StackedLoRALinear


class ScoredHead:
    """Makes a model's ``lm_head`` see only the scored positions of a batch.

    A hook at the head's entrance, rather than the decoder and the head called one by one: whatever the model
    does around its head (soft-capping, scaling) stays its own business.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, batch: Batch) -> torch.Tensor:
        """Run the model on ``batch`` and return the logits [P, V] at ``batch.scored``."""
        with self._only(batch):
            output = self.model(
                input_ids=batch.input_ids,
                # Right padding is invisible to causal attention, so ordinary rows need no mask.
                attention_mask=batch.mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        return output.logits[0]

    @contextmanager
    def _only(self, batch: Batch) -> Iterator[None]:
        head = self.model.get_output_embeddings()
        # a head that is adapted itself has to know whose positions these are
        shares = (batch.scored_per_member(),) if isinstance(head, StackedLoRALinear) else ()

        def gather(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = inputs[0].flatten(0, 1).index_select(0, batch.scored)[None]
            return (hidden, *inputs[1:], *shares)

        handle = head.register_forward_pre_hook(gather)
        try:
            yield
        finally:
            handle.remove()


def loglikelihoods(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the loglikelihood of every choice, float32 [N, D, C] in nats; padding choices are 0.

    Args:
        logits: [P, V] at the batch's scored outputs.
        batch: the batch they belong to.
    """
    tokens: torch.Tensor = TokenLoglikelihoods.apply(logits, batch.output, batch.target)
    return (tokens * batch.weight).sum(-1)


class TokenLoglikelihoods(torch.autograd.Function):
    """``log softmax(logits[output])[target]`` in float32, for indices of any shape.

    Autograd would keep and write several tensors as large as the logits; here the backward pass makes one, the
    softmax, and adds the targets to it.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loglikelihoods in nats, of the indices' shape."""
        wide = _at_least_float32(logits)
        normaliser = wide.logsumexp(-1)
        ctx.save_for_backward(logits, normaliser, output, target)
        return _at_least_float32(logits[output, target]) - normaliser[output]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the logits: one-hot targets minus softmax, weighted."""
        logits, normaliser, output, target = ctx.saved_tensors
        rows, columns, values = output.flatten(), target.flatten(), gradients[0].flatten()
        of_row = torch.zeros_like(normaliser).index_put_((rows,), values, accumulate=True)
        grad = (_at_least_float32(logits) - normaliser[:, None]).exp_().mul_(-of_row[:, None])
        grad.index_put_((rows, columns), values, accumulate=True)
        return grad.to(logits.dtype), None, None


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def document_losses(lls: torch.Tensor, batch: Batch, objective: str) -> torch.Tensor:
    """Return each document's loss [N, D], in nats.

    ``answer``: −log p(gold continuation | prompt), summed over its tokens over the full vocabulary. With a
    one-letter answer it is the cross-entropy at the letter (arXiv 2402.12264).
    ``choices``: −log of the gold choices' share of the softmax over the choices' loglikelihoods, each divided by
    the batch's divisor.

    Args:
        lls: [N, D, C] from :func:`loglikelihoods`.
        batch: the batch they belong to; for ``answer`` its only choice is the gold one.
        objective: ``answer`` or ``choices``.
    """
    if objective == "answer":
        return -lls[..., 0]
    scores = lls / batch.divisor
    choices = scores.masked_fill(~batch.is_choice, -torch.inf)
    gold = scores.masked_fill(~batch.is_gold, -torch.inf)
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
