"""All members in one batch over one frozen base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
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
from lm_eval_lora_ensemble.train.objective import ScoredHead, document_losses, loglikelihoods
from lm_eval_lora_ensemble.train.optimiser import MemberTensors
from lm_eval_lora_ensemble.train.stacked import Lineup, MemberMatrix, StackedLoRALinear

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.layout import Layout
    from lm_eval_lora_ensemble.train.optimiser import MemberOptimiser
    from lm_eval_lora_ensemble.train.order import MicroBatch
    from lm_eval_lora_ensemble.train.recipe import Recipe


# Tokens of a forward pass beyond which its matrix products get no faster.
_ENOUGH_TOKENS = {"cpu": 1024, "accelerator": 8192}


class JointEngine(Engine):
    """Trains all members of a process together.

    The base runs once a layer for the whole batch; the loss that is differentiated is the sum of the members'
    losses, in which each member's parameters appear in its own term alone.

    Args:
        model: a ``PeftModel`` with one adapter a member, all of them plain LoRA on linear layers. Its LoRA
            layers are replaced by stacked ones; the object is not to be used afterwards.
        members: seed of each member by name; the names are the adapters'.
        recipe: the run's recipe.
        layout: the training data's rows.
        total_steps: optimiser steps of the whole run.
    """

    def __init__(
        self, model: Any, members: dict[str, int], recipe: Recipe, layout: Layout, total_steps: int
    ) -> None:
        self.names = list(members)
        self.recipe = recipe
        self.layout = layout
        self.device = next(model.parameters()).device
        self.lineup = Lineup(list(members.values()), recipe.dropout)
        self.head = ScoredHead(model.base_model.model)
        self.stacked, self.matrix = stack(model, self.names, self.lineup)
        self._optimisers = {
            name: member_optimiser(
                MemberTensors([row], self._tensor_names(), self.matrix.shapes),
                recipe,
                total_steps,
                seed=members[name],
                documents=len(layout),
            )
            for name, row in zip(self.names, self.matrix.rows(), strict=True)
        }
        if recipe.gradient_checkpointing:
            checkpoint_layers(self.head.model)

    def step(self, batches: Sequence[MicroBatch], step: int, active: Sequence[str]) -> dict[str, float]:
        """Take the gradients of all members at once, then update each; see :meth:`Engine.step`."""
        self.matrix.gradients.zero_()
        documents = sum(len(part.documents[0]) for part in batches)
        totals = dict.fromkeys(active, 0.0)
        with self.sampling(step, active):
            for number, part in enumerate(batches):
                tokens = len(part.documents[0]) * self.layout.rows_per_document * part.length
                for names in self._together(active, tokens):
                    losses = self._gradients(names, part, step, number) / documents
                    for name, loss in zip(names, losses.tolist(), strict=True):
                        totals[name] += loss
            refuse_nonfinite_loss(totals, step + 1)
            self.matrix.gradients.div_(documents)
            self._add_penalty_gradients()
        for name in active:
            self._optimisers[name].step(step)
        return totals

    def _gradients(self, names: Sequence[str], part: MicroBatch, step: int, number: int) -> torch.Tensor:
        """Add the gradients of the summed document losses, and return those sums, one a member."""
        members = [self.names.index(name) for name in names]
        batch = self.layout.batch([part.documents[m] for m in members], part.length, self.device)
        with self.lineup.training(members, step, number):
            lls = loglikelihoods(self.head.logits(batch), batch)
            losses = document_losses(lls, batch, self.recipe.objective).sum(-1)
            # Under gradient checkpointing the backward pass runs the layers again, so the line-up must stand.
            with warnings.catch_warnings():
                # The columns of the member matrix are strided on purpose: its rows are each member's.
                warnings.filterwarnings("ignore", message="grad and param do not obey")
                losses.sum().backward()
        return losses.detach()

    def _together(self, names: Sequence[str], tokens: int) -> Iterator[Sequence[str]]:
        """Cut the members into the parts that share a forward pass; memory for time, same results.

        Without ``members_at_once`` a part holds as many members as keep the hardware busy, and no more: beyond
        that a larger batch takes memory and saves nothing.

        Args:
            names: the members.
            tokens: input tokens of one member.
        """
        enough = _ENOUGH_TOKENS["cpu" if self.device.type == "cpu" else "accelerator"]
        size = self.recipe.members_at_once or max(1, -(-enough // tokens))
        parts = -(-len(names) // size)
        for part in range(parts):
            yield names[part * len(names) // parts : (part + 1) * len(names) // parts]

    @torch.no_grad()
    def _add_penalty_gradients(self) -> None:
        """Add the gradients of λ·‖B·A‖²_F (2λ·BᵀB·A and 2λ·B·A·Aᵀ) and of λ_B·‖B‖²_F, layer by layer."""
        product, square = self.recipe.lora_l2, self.recipe.lora_b_l2
        if not product and not square:
            return
        for layer in self.stacked.values():
            A, B = layer.A, layer.B
            assert A.grad is not None
            assert B.grad is not None
            if product:
                A.grad.add_(torch.bmm(torch.bmm(B.mT, B), A), alpha=2 * product)
                B.grad.add_(torch.bmm(B, torch.bmm(A, A.mT)), alpha=2 * product)
            if square:
                B.grad.add_(B, alpha=2 * square)

    def loglikelihoods(
        self, layout: Layout, documents: Sequence[int], length: int, members: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """See :meth:`Engine.loglikelihoods`."""
        parts = []
        for names in self._together(members, len(documents) * layout.rows_per_document * length):
            batch = layout.batch([documents] * len(names), length, self.device)
            with torch.no_grad(), self.lineup.scoring([self.names.index(name) for name in names]):
                lls = loglikelihoods(self.head.logits(batch), batch)
            parts.append(lls.masked_fill(~batch.is_choice, -torch.inf).cpu().double().numpy())
        return np.concatenate(parts)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """See :meth:`Engine.weights`."""
        member = self.names.index(name)
        tensors = [
            matrix[member].detach() for layer in self.stacked.values() for matrix in (layer.A, layer.B)
        ]
        return dict(zip(self._tensor_names(), tensors, strict=True))

    def _tensor_names(self) -> list[str]:
        """Return what adapter_model.safetensors calls a member's tensors, in the order of the matrix's columns."""
        return [
            f"base_model.model.{layer}.{kind}.weight"
            for layer in self.stacked
            for kind in ("lora_A", "lora_B")
        ]

    def optimiser(self, name: str) -> MemberOptimiser:
        """See :meth:`Engine.optimiser`."""
        return self._optimisers[name]


def stack(
    model: Any, names: Sequence[str], lineup: Lineup
) -> tuple[dict[str, StackedLoRALinear], MemberMatrix]:
    """Replace a ``PeftModel``'s LoRA layers by stacked ones that hold its adapters' weights.

    Returns:
        The stacked layers by their names in the base model, and the matrix whose views they train.
    """
    base = model.base_model.model
    layers = lora_layers(model)
    weights = [
        torch.stack([getattr(layer, kind)[name].weight.detach() for name in names])
        for layer in layers.values()
        for kind in ("lora_A", "lora_B")
    ]
    matrix = MemberMatrix([w.shape[1:] for w in weights], len(names), weights[0].device)
    parameters = matrix.layers()
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    stacked = {}
    for i, (name, layer) in enumerate(layers.items()):
        stacked[name] = StackedLoRALinear(
            layer.base_layer,
            parameters[2 * i],
            parameters[2 * i + 1],
            scaling=layer.scaling[names[0]],
            lineup=lineup,
            index=i,
        )
        base.set_submodule(name, stacked[name])
    return stacked, matrix
