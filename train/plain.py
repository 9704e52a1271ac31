"""Members one after another in PEFT's own layers: for whatever cannot be stacked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lm_eval_lora_ensemble.train.adapters import lora_layers
from lm_eval_lora_ensemble.train.engine import (
    Engine,
    checkpoint_layers,
    member_optimiser,
    refuse_nonfinite_loss,
)
from lm_eval_lora_ensemble.train.objective import (
    ScoredHead,
    document_losses,
    loglikelihoods,
    squared_norm_of_product,
)
from lm_eval_lora_ensemble.train.optimiser import MemberTensors

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.layout import Layout
    from lm_eval_lora_ensemble.train.optimiser import MemberOptimiser
    from lm_eval_lora_ensemble.train.order import MicroBatch
    from lm_eval_lora_ensemble.train.recipe import Recipe


class PlainEngine(Engine):
    """Trains the adapters of one ``PeftModel`` in turn.

    Args:
        model: a ``PeftModel`` with one adapter a member.
        members: seed of each member by name; the names are the adapters'.
        recipe: the run's recipe.
        layout: the training data's rows.
        total_steps: optimiser steps of the whole run.
    """

    def __init__(
        self, model: Any, members: dict[str, int], recipe: Recipe, layout: Layout, total_steps: int
    ) -> None:
        self.model = model
        self.names = list(members)
        self.seeds = members
        self.recipe = recipe
        self.layout = layout
        self.device = next(model.parameters()).device
        self.head = ScoredHead(model.base_model.model)
        self._optimisers = {}
        for name in self.names:
            self._select(name)
            own = {
                key.replace(f".{name}.", "."): parameter
                for key, parameter in model.named_parameters()
                if f".{name}." in key
            }
            self._optimisers[name] = member_optimiser(
                MemberTensors(list(own.values()), list(own), [parameter.shape for parameter in own.values()]),
                recipe,
                total_steps,
                seed=members[name],
                documents=len(layout),
            )
        model.eval()  # once: it would undo what follows
        if recipe.gradient_checkpointing:
            checkpoint_layers(self.head.model)

    def step(self, batches: Sequence[MicroBatch], step: int, active: Sequence[str]) -> dict[str, float]:
        """Take the members' gradients in turn, then update them all; see :meth:`Engine.step`."""
        with self.sampling(step, active):
            losses = {name: self._gradients(name, batches, step) for name in active}
            refuse_nonfinite_loss(losses, step + 1)
        for name in active:
            self._optimisers[name].step(step)
            self._optimisers[name].zero_gradients()
        return losses

    def _gradients(self, name: str, batches: Sequence[MicroBatch], step: int) -> float:
        """Accumulate one member's gradient over the step's batches and return its mean data loss."""
        member = self.names.index(name)
        documents = sum(len(batch.documents[member]) for batch in batches)
        total = 0.0
        self._select(name)
        with self._training(self.seeds[name], step):
            for part in batches:
                batch = self.layout.batch([part.documents[member]], part.length, self.device)
                lls = loglikelihoods(self.head.logits(batch), batch)
                loss = document_losses(lls, batch, self.recipe.objective).sum() / documents
                loss.backward()
                total += float(loss.detach())
        penalty = self._penalty(name)
        if penalty is not None:
            penalty.backward()
        return total

    def _penalty(self, name: str) -> torch.Tensor | None:
        """Return λ·Σ‖B·A‖²_F + λ_B·Σ‖B‖²_F over the member's layers, or None if both factors are 0."""
        product, square = self.recipe.lora_l2, self.recipe.lora_b_l2
        if not product and not square:
            return None
        total = torch.zeros((), device=self.device)
        for layer in lora_layers(self.model).values():
            if name in layer.lora_A:
                A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
                if product:
                    total = total + product * squared_norm_of_product(A, B)
                if square:
                    total = total + square * B.square().sum()
        return total

    def loglikelihoods(
        self, layout: Layout, documents: Sequence[int], length: int, members: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """See :meth:`Engine.loglikelihoods`."""
        batch = layout.batch([documents], length, self.device)
        rows = []
        for name in members:
            self._select(name)
            with torch.no_grad():
                lls = loglikelihoods(self.head.logits(batch), batch)
            rows.append(lls.masked_fill(~batch.is_choice, -torch.inf)[0].cpu().double().numpy())
        return np.stack(rows)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """See :meth:`Engine.weights`."""
        from peft import get_peft_model_state_dict

        # by itself PEFT adds the base's embeddings where the head is adapted: the whole vocabulary, frozen
        state: dict[str, torch.Tensor] = get_peft_model_state_dict(
            self.model, adapter_name=name, save_embedding_layers=False
        )
        return state

    def optimiser(self, name: str) -> MemberOptimiser:
        """See :meth:`Engine.optimiser`."""
        return self._optimisers[name]

    def _select(self, name: str) -> None:
        """Make one adapter the active one; PEFT then requires a gradient of it alone."""
        self.model.set_adapter(name)

    @contextmanager
    def _training(self, seed: int, step: int) -> Iterator[None]:
        """Train mode with dropout drawn from a stream of this member and step alone.

        Only the adapters' dropout is switched on: a base model's own dropout stays off, as it does when the
        members are stacked.
        """
        for layer in lora_layers(self.model).values():
            layer.train()
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(
                    int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
                )
                yield
        finally:
            # the adapters alone: layers that recompute stay in train mode
            for layer in lora_layers(self.model).values():
                layer.eval()
