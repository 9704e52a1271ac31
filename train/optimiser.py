"""What moves one member's parameters: the interface, AdamW, and the course of the learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lm_eval_lora_ensemble.errors import EnsembleError

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.posterior_state import PosteriorState
    from lm_eval_lora_ensemble.train.recipe import Recipe


@dataclass(frozen=True)
class MemberTensors:
    """One member's trainable numbers, and which of its adapter's tensors they are.

    Attributes:
        parameters: what is trained: a parameter a tensor, or one flat parameter that holds all of them.
        names: of the tensors in adapter_model.safetensors, in the order of the numbers.
        shapes: of the tensors.
    """

    parameters: Sequence[torch.nn.Parameter]
    names: Sequence[str]
    shapes: Sequence[torch.Size]

    def flat(self) -> torch.Tensor:
        """Return a copy of all the numbers, [P]."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters])

    def flat_gradient(self) -> torch.Tensor:
        """Return a copy of the gradients, [P]; 0 where there is none."""
        return torch.cat(
            [
                torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
                for parameter in self.parameters
            ]
        )

    @torch.no_grad()
    def put(self, values: torch.Tensor) -> None:
        """Write [P] numbers into the parameters, in place."""
        start = 0
        for parameter in self.parameters:
            parameter.copy_(values[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()

    def split(self, values: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor's name and its part of [P] numbers, a view in its shape."""
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            yield name, values[start : start + shape.numel()].view(shape)
            start += shape.numel()


class MemberOptimiser(ABC):
    """One member's optimiser, with its gradient clipping and course of the learning rate.

    A variational optimiser wants the gradients at a draw of the weights: :meth:`sample` moves them there,
    :meth:`restore` moves them back to what they were, to the bit. Others leave them in place.

    Args:
        tensors: the member's own.
        recipe: learning rate, weight decay, clipping and schedule.
        total_steps: optimiser steps of the whole run, which the schedule spans.
    """

    def __init__(self, tensors: MemberTensors, recipe: Recipe, total_steps: int) -> None:
        self.tensors = tensors
        self.parameters = list(tensors.parameters)
        self.recipe = recipe
        self.total_steps = total_steps

    @abstractmethod
    def sample(self, step: int) -> None:
        """Move the parameters to where the gradients of ``step`` (from 0) are taken."""

    @abstractmethod
    def restore(self) -> None:
        """Move the parameters back."""

    @abstractmethod
    def step(self, step: int) -> float:
        """Clip, update with the rate of ``step`` (from 0), and return the gradient's norm before clipping."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Return parameters and moments by name, for a checkpoint."""

    @abstractmethod
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what :meth:`state` returned."""

    def posterior(self) -> PosteriorState | None:
        """Return what was learnt about the weights beside their mean; None if they are a point."""
        return None

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step."""
        for parameter in self.parameters:
            parameter.grad = None

    def _clip(self, step: int) -> float:
        """Clip the gradient and return its norm before.

        Raises:
            EnsembleError: it is not finite; the weights are as they were, and no checkpoint has them otherwise.
        """
        clip = self.recipe.gradient_clip
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, math.inf if clip is None else clip))
        if not math.isfinite(norm):
            raise EnsembleError(
                f"a gradient is {norm} at step {step + 1}; lower learning_rate, or use dtype=bfloat16 or float32"
            )
        return norm

    def _rate(self, step: int) -> float:
        return learning_rate(self.recipe, step, self.total_steps)


class AdamWOptimiser(MemberOptimiser):
    """A member's AdamW; see :class:`MemberOptimiser`."""

    def __init__(self, tensors: MemberTensors, recipe: Recipe, total_steps: int) -> None:
        super().__init__(tensors, recipe, total_steps)
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    def sample(self, step: int) -> None:
        """Leave the weights where they are: they are a point."""

    def restore(self) -> None:
        """Leave the weights where they are."""

    def step(self, step: int) -> float:
        """See :meth:`MemberOptimiser.step`."""
        norm = self._clip(step)
        for group in self.adamw.param_groups:
            group["lr"] = self._rate(step)
        self.adamw.step()
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """See :meth:`MemberOptimiser.state`."""
        tensors = {}
        for i, parameter in enumerate(self.parameters):
            tensors[f"{i}.parameter"] = parameter.detach()
            for name, value in self.adamw.state[parameter].items():
                tensors[f"{i}.{name}"] = value
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """See :meth:`MemberOptimiser.load_state`."""
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
    """Return the learning rate of step ``step`` (from 0).

    Linear warm-up, then the schedule down to 0 at ``total_steps``; from ``swa_start`` on a constant rate instead.
    """
    start = swa_start_step(recipe, total_steps)
    if start is not None and step >= start:
        return recipe.swa_learning_rate or recipe.learning_rate
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / (recipe.warmup_steps + 1)
    done = (step - recipe.warmup_steps) / max(1, total_steps - recipe.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[recipe.schedule]
    return recipe.learning_rate * factor


def swa_start_step(recipe: Recipe, total_steps: int) -> int | None:
    """Return how many steps go before the constant rate of ``swa_start``; None without one."""
    start = recipe.swa_start
    if start is None:
        return None
    return round(start * total_steps) if start < 1 else int(start)


def draw_seed(seed: int, step: int) -> int:
    """Return the seed of a member's draw of weights at a step: like dropout's, a function of both and nothing else."""
    # dropout's sequences are [seed, step, batch, layer]; no run has so many batches a step
    entropy = [seed, step, _DRAWS]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


_DRAWS = 2**32 - 1
