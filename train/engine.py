"""What both ways of training share: an optimiser for each member, and the interface of a step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lm_eval_lora_ensemble.errors import EnsembleError

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.layout import Layout
    from lm_eval_lora_ensemble.train.order import MicroBatch
    from lm_eval_lora_ensemble.train.recipe import Recipe


class MemberOptimiser:
    """One member's AdamW, gradient clipping and learning-rate schedule.

    Args:
        parameters: the member's own parameters.
        recipe: learning rate, weight decay, clipping and schedule.
        total_steps: optimiser steps of the whole run, which the schedule spans.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], recipe: Recipe, total_steps: int) -> None:
        self.parameters = list(parameters)
        self.recipe = recipe
        self.total_steps = total_steps
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    def step(self, step: int) -> float:
        """Clip, update with the rate of ``step`` (from 0), and return the gradient's norm before clipping."""
        clip = self.recipe.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, math.inf if clip is None else clip)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.recipe, step, self.total_steps)
        self.adamw.step()
        return float(norm)

    def state(self) -> dict[str, torch.Tensor]:
        """Return parameters and moments by name, for a checkpoint."""
        tensors = {}
        for i, parameter in enumerate(self.parameters):
            tensors[f"{i}.parameter"] = parameter.detach()
            for name, value in self.adamw.state[parameter].items():
                tensors[f"{i}.{name}"] = value
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what :meth:`state` returned."""
        for i, parameter in enumerate(self.parameters):
            prefix = f"{i}."
            state = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
            with torch.no_grad():
                parameter.copy_(state.pop("parameter"))
            self.adamw.state[parameter] = {
                name: value.clone() if name == "step" else value.to(parameter.device, copy=True)
                for name, value in state.items()
            }


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0): linear warm-up, then the schedule down to 0."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / (recipe.warmup_steps + 1)
    done = (step - recipe.warmup_steps) / max(1, total_steps - recipe.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[recipe.schedule]
    return recipe.learning_rate * factor


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

    @abstractmethod
    def optimiser(self, name: str) -> MemberOptimiser:
        """Return a member's optimiser; its state and the step number are all there is to resume."""
