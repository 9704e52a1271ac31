"""Project to the vocabulary only where a token is scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lm_eval_lora_ensemble.train.layout import Batch


class ScoredHead:
    """Makes a model's ``lm_head`` see only the scored positions of a batch.

    A hook at the head's entrance, rather than the decoder and the head called one by one: whatever the model
    does around its head (soft-capping, scaling) stays its own business.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, batch: Batch) -> torch.Tensor:
        """Run the model on ``batch`` and return the logits [P, V] at ``batch.scored``."""
        with self._only(batch.scored):
            output = self.model(
                input_ids=batch.input_ids,
                # Right padding is invisible to causal attention, so ordinary rows need no mask.
                attention_mask=batch.mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        return output.logits[0]

    @contextmanager
    def _only(self, scored: torch.Tensor) -> Iterator[None]:
        def gather(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = inputs[0]
            return (hidden.flatten(0, 1).index_select(0, scored)[None], *inputs[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(gather)
        try:
            yield
        finally:
            handle.remove()
