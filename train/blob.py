"""BLoB: a Gaussian over A, learnt by backpropagation through its draws.

Wang et al. 2024, "BLoB: Bayesian Low-Rank Adaptation by Backpropagation" (arXiv 2406.11675). B is a point; A has
independent elements N(M, Ω²) with Ω = G², and the prior N(0, σ_p²). A step draws A = M + Ω ∘ ε, takes the gradient of
the data loss there, and gives M the gradient of A, G that of A times ε ∘ 2G. AdamW moves M, G and B by these; then

    KL = Σ log(σ_p / Ω) − ½ + (Ω² + M²) / (2 σ_p²)

moves M and G by plain gradient descent, at a rate of its own divided by the steps of an epoch, so that an epoch takes
the divergence into account once. The rate follows the learning rate's course.

The paper draws signs anew for every document on top of ε (flipout); here a step has one draw, which is an adapter.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lm_eval_lora_ensemble.train.optimiser import AdamWOptimiser, draw_seed
from lm_eval_lora_ensemble.train.posterior_state import PosteriorState

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.optimiser import MemberTensors
    from lm_eval_lora_ensemble.train.recipe import Recipe

_INITIAL = -1
"""The step whose draw is G's initial values."""


class BlobOptimiser(AdamWOptimiser):
    """A member's BLoB; the noise of a step is a function of the member's seed and the step.

    Args:
        tensors: the member's own; the parameters hold M in the place of A.
        recipe: learning rate, schedule, weight decay of M and B, and the ``blob_`` keys.
        total_steps: optimiser steps of the whole run.
        seed: the member's.
        documents: number of training documents.
    """

    def __init__(
        self, tensors: MemberTensors, recipe: Recipe, total_steps: int, *, seed: int, documents: int
    ) -> None:
        super().__init__(tensors, recipe, total_steps)
        self.seed = seed
        self.steps_per_epoch = math.ceil(documents / (recipe.batch_size * recipe.gradient_accumulation))
        self.mean = tensors.flat()
        self.of_a = _columns_of_a(tensors).to(self.mean.device)
        self.noise = torch.zeros_like(self.mean[self.of_a])
        self.root = torch.nn.Parameter(self._initial_root())
        self.parameters.append(self.root)
        self.adamw.add_param_group({"params": [self.root], "weight_decay": 0.0})

    def _initial_root(self) -> torch.Tensor:
        """Draw G uniformly between ε/√2 and ε: deviations Ω between ε²/2 and ε²."""
        largest = self.recipe.blob_epsilon
        values = torch.empty_like(self.noise)
        return values.uniform_(largest / math.sqrt(2), largest, generator=self._generator(_INITIAL))

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator(self.mean.device).manual_seed(draw_seed(self.seed, step + 1))

    @torch.no_grad()
    def sample(self, step: int) -> None:
        """Move A to a draw, M + Ω ∘ ε."""
        self.mean = self.tensors.flat()
        self.noise.normal_(generator=self._generator(step))
        draw = self.mean.clone()
        draw[self.of_a] += self.root.square() * self.noise
        self.tensors.put(draw)

    def restore(self) -> None:
        """Move A back to M."""
        self.tensors.put(self.mean)

    @torch.no_grad()
    def step(self, step: int) -> float:
        """See :meth:`MemberOptimiser.step`; the gradients are those at the draw of this step."""
        self.root.grad = self.tensors.flat_gradient()[self.of_a] * self.noise * 2 * self.root
        norm = super().step(step)
        values = self.tensors.flat()
        of_mean, of_root = kl_gradients(values[self.of_a], self.root, self.recipe.blob_prior)
        course = self._rate(step) / self.recipe.learning_rate
        rate = self.recipe.blob_kl_learning_rate * course / self.steps_per_epoch
        values[self.of_a] -= rate * of_mean
        self.tensors.put(values)
        self.root.sub_(rate * of_root)
        return norm

    def posterior(self) -> PosteriorState:
        """Return G of every A."""
        everywhere = torch.zeros_like(self.mean)
        everywhere[self.of_a] = self.root.detach()
        roots = {name: G for name, G in self.tensors.split(everywhere) if is_a(name)}
        return PosteriorState("blob", {"prior": self.recipe.blob_prior}, roots)


def kl_divergence(mean: torch.Tensor, root: torch.Tensor, prior: float) -> torch.Tensor:
    """Return KL(N(M, G⁴) ‖ N(0, prior²)) summed over the elements, in nats.

    Args:
        mean: M.
        root: G, of the same shape; the standard deviation is Ω = G².
        prior: the prior's standard deviation.
    """
    deviation = root.square()
    terms = (prior / deviation).log() - 0.5 + (deviation.square() + mean.square()) / (2 * prior**2)
    return terms.sum()


def kl_gradients(mean: torch.Tensor, root: torch.Tensor, prior: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of :func:`kl_divergence` by M, M / σ_p², and by G, 2 G³ / σ_p² − 2 / G."""
    return mean / prior**2, 2 * root**3 / prior**2 - 2 / root


def is_a(name: str) -> bool:
    """Whether a tensor of an adapter is a layer's A."""
    return name.endswith(".lora_A.weight")


def _columns_of_a(tensors: MemberTensors) -> torch.Tensor:
    """Return where the numbers of A are among a member's."""
    kinds = [torch.full((s.numel(),), is_a(n)) for n, s in zip(tensors.names, tensors.shapes, strict=True)]
    return torch.cat(kinds).nonzero().flatten()
