"""What both ways of training share: which optimiser a member has, and the interface of a step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train.blob import BlobOptimiser
from lm_eval_lora_ensemble.train.ivon import IvonOptimiser
from lm_eval_lora_ensemble.train.optimiser import AdamWOptimiser, MemberOptimiser

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.layout import Layout
    from lm_eval_lora_ensemble.train.optimiser import MemberTensors
    from lm_eval_lora_ensemble.train.order import MicroBatch
    from lm_eval_lora_ensemble.train.recipe import Recipe


def member_optimiser(
    tensors: MemberTensors, recipe: Recipe, total_steps: int, *, seed: int, documents: int
) -> MemberOptimiser:
    """Return the optimiser that a recipe gives a member.

    Args:
        tensors: the member's own.
        recipe: which optimiser, and its settings.
        total_steps: optimiser steps of the whole run.
        seed: the member's, for the draws of its weights.
        documents: number of training documents.
    """
    if recipe.variational == "ivon":
        return IvonOptimiser(tensors, recipe, total_steps, seed=seed)
    if recipe.variational == "blob":
        return BlobOptimiser(tensors, recipe, total_steps, seed=seed, documents=documents)
    return AdamWOptimiser(tensors, recipe, total_steps)


def refuse_nonfinite_loss(losses: dict[str, float], step: int) -> None:
    """Stop the run at the first loss that is not a number, naming member and step (counted from 1)."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise EnsembleError(
                f"the loss of {name} is {loss} at step {step}; lower learning_rate, set gradient_clip, "
                "or use dtype=bfloat16 or float32"
            )


def checkpoint_layers(model: Any) -> None:
    """Recompute the decoder layers' activations in the backward pass instead of keeping them.

    transformers checkpoints a layer only in train mode; the layers alone are put there, not what is in them,
    so that a base model's own dropout stays off.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5's name
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True


class Engine(ABC):
    """Trains a set of members. Steps are counted from 0; ``names`` keep the members' order throughout."""

    names: list[str]

    @abstractmethod
    def step(self, batches: Sequence[MicroBatch], step: int, active: Sequence[str]) -> dict[str, float]:
        """Take one optimiser step of the active members and return their data losses (mean over documents).

        Args:
            batches: the step's batches; each holds the documents of every member of ``names``.
            step: the step's number, for schedule and dropout.
            active: the members to train; the others stay as they are.

        Raises:
            EnsembleError: a loss is not finite. No member has been changed by this step then.
        """

    @abstractmethod
    def loglikelihoods(
        self, layout: Layout, documents: Sequence[int], length: int, members: Sequence[str]
    ) -> npt.NDArray[np.float64]:
        """Return each choice's loglikelihood [N, D, C] in nats, without dropout; padding choices are −inf."""

    @abstractmethod
    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return a member's adapter weights by their names in ``adapter_model.safetensors``."""

    @contextmanager
    def sampling(self, step: int, members: Sequence[str]) -> Iterator[None]:
        """Hold the members' weights where a step's gradients are taken: at a draw, under a variational optimiser."""
        for name in members:
            self.optimiser(name).sample(step)
        try:
            yield
        finally:
            for name in members:
                self.optimiser(name).restore()

    @abstractmethod
    def optimiser(self, name: str) -> MemberOptimiser:
        """Return a member's optimiser; its state and the step number are all there is to resume."""
