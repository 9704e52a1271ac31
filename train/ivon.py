"""IVON: a Gaussian over the weights, learnt by an optimiser that costs what Adam costs.

Shen et al. 2024, "Variational Learning is Effective for Large Deep Networks" (arXiv 2402.17641), algorithm 1 with its
practical choices. The weights' posterior is N(m, diag(1 / (ess · (h + δ)))): m is the adapter that is saved, h an
estimate of the loss's Hessian, δ ``weight_decay``, ess the effective sample size. A step draws θ, takes the gradient
g there and sets, element by element,

    ĥ = g · (θ − m) · ess · (h + δ)                          the reparameterisation estimate
    h ← β₂ h + (1 − β₂) ĥ + ½ (1 − β₂)² (h − ĥ)² / (h + δ)
    v ← β₁ v + (1 − β₁) g
    m ← m − lr · clip((v / (1 − β₁ᵗ) + δ m) / (h + δ), ± clip_radius)

The last correction of h keeps h + δ positive. One draw a step serves all its batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lm_eval_lora_ensemble.train.optimiser import MemberOptimiser, draw_seed
from lm_eval_lora_ensemble.train.posterior_state import PosteriorState

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.optimiser import MemberTensors
    from lm_eval_lora_ensemble.train.recipe import Recipe


class IvonOptimiser(MemberOptimiser):
    """A member's IVON; the noise of a step is a function of the member's seed and the step.

    Args:
        tensors: the member's own.
        recipe: learning rate, schedule, weight decay δ and the ``ivon_`` keys.
        total_steps: optimiser steps of the whole run.
        seed: the member's.
    """

    def __init__(self, tensors: MemberTensors, recipe: Recipe, total_steps: int, *, seed: int) -> None:
        super().__init__(tensors, recipe, total_steps)
        self.seed = seed
        self.mean = tensors.flat()
        self.noise = torch.zeros_like(self.mean)
        self.momentum = torch.zeros_like(self.mean)
        self.hessian = torch.full_like(self.mean, recipe.ivon_hess_init)

    def sample(self, step: int) -> None:
        """Move the parameters to a draw from the posterior."""
        generator = torch.Generator(self.mean.device).manual_seed(draw_seed(self.seed, step))
        self.mean = self.tensors.flat()
        deviation = standard_deviation(self.hessian, self.recipe.ivon_ess, self.recipe.weight_decay)
        self.noise = torch.empty_like(self.mean).normal_(generator=generator) * deviation
        self.tensors.put(self.mean + self.noise)

    def restore(self) -> None:
        """Move the parameters back to the mean."""
        self.tensors.put(self.mean)

    def step(self, step: int) -> float:
        """See :meth:`MemberOptimiser.step`; the gradients are those at the draw of this step."""
        norm = self._clip(step)
        recipe, gradient = self.recipe, self.tensors.flat_gradient()
        beta1, beta2, decay = recipe.ivon_beta1, recipe.ivon_beta2, recipe.weight_decay
        self.momentum.mul_(beta1).add_(gradient, alpha=1 - beta1)
        estimate = self.noise * gradient * (self.hessian + decay) * recipe.ivon_ess
        correction = (self.hessian - estimate).square() / (self.hessian + decay)
        self.hessian.mul_(beta2).add_(estimate, alpha=1 - beta2)
        self.hessian.add_(correction, alpha=0.5 * (1 - beta2) ** 2)
        direction = (self.momentum / (1 - beta1 ** (step + 1)) + decay * self.mean) / (self.hessian + decay)
        radius = recipe.ivon_clip_radius
        if radius is not None:
            direction.clamp_(-radius, radius)
        self.tensors.put(self.mean - self._rate(step) * direction)
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """See :meth:`MemberOptimiser.state`."""
        return {"mean": self.tensors.flat(), "momentum": self.momentum, "hessian": self.hessian}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """See :meth:`MemberOptimiser.load_state`."""
        self.tensors.put(tensors["mean"].to(self.mean.device))
        self.momentum = tensors["momentum"].to(self.mean.device, copy=True)
        self.hessian = tensors["hessian"].to(self.mean.device, copy=True)

    def posterior(self) -> PosteriorState:
        """Return the Hessian, and what else the deviations depend on."""
        settings = {"ess": self.recipe.ivon_ess, "weight_decay": self.recipe.weight_decay}
        return PosteriorState("ivon", settings, dict(self.tensors.split(self.hessian)))


def standard_deviation(hessian: torch.Tensor, ess: float, weight_decay: float) -> torch.Tensor:
    """Return the posterior's standard deviations, 1 / √(ess · (h + δ)), of the Hessian's shape."""
    return (ess * (hessian + weight_decay)).rsqrt()
