"""A Gaussian over weight matrices with Kronecker-factored precision, and the precision of its prior by evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import optimize

from lm_eval_lora_ensemble.posterior.contract import AdapterState, Posterior, StoredState
from lm_eval_lora_ensemble.posterior.kfac import KroneckerFactors
from lm_eval_lora_ensemble.posterior.lora_layers import as_state

PRECISION_RANGE = (1e-6, 1e12)
_GRID_STEPS = 73  # four a decade


@dataclass(frozen=True)
class UncertainWeight:
    """One weight W ~ N(mean, (count · G ⊗ A + λI)⁻¹).

    Attributes:
        mean: float64 [out, in].
        factors: G and A, the curvature of one document on average, or summed with ``count`` 1.
        count: by which the curvature is multiplied.
    """

    mean: torch.Tensor
    factors: KroneckerFactors
    count: float = 1.0

    @property
    def curvature(self) -> torch.Tensor:
        """Return the eigenvalues of the curvature, [k_out, k_in]; all others are 0."""
        return self.count * self.factors.eigenvalues

    def draw(self, precision: float, generator: torch.Generator) -> torch.Tensor:
        """Draw W [out, in]; exact, in the eigenbasis of the factors.

        Directions outside the known eigenvectors have the prior's precision, so white noise of that precision is drawn
        first and shrunk inside their span.
        """
        G, A = self.factors.gradients.vectors, self.factors.inputs.vectors
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float64)
        outside = 1 / math.sqrt(precision)
        shrinking = (self.curvature + precision).rsqrt() - outside
        return self.mean + outside * noise + G @ (shrinking * (G.T @ noise @ A)) @ A.T


class KroneckerPosterior(Posterior):
    """Independent Gaussians over some of an adapter's matrices; the others are points.

    Args:
        state: the adapter, whose other tensors every draw repeats.
        weights: what is drawn, by the name in ``state``.
        precision: λ > 0, of the prior.
        config: the source's.
        settings: for the manifest.
    """

    def __init__(
        self,
        state: StoredState,
        weights: Mapping[str, UncertainWeight],
        precision: float,
        config: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        self.state = state
        self.weights = weights
        self.precision = precision
        self.config = config
        self.settings = settings

    def draw(self, generator: torch.Generator) -> AdapterState:
        """See :meth:`.contract.Posterior.draw`; float32, whatever the source was stored in."""
        drawn = {name: self.weights[name].draw(self.precision, generator) for name in sorted(self.weights)}
        return as_state(drawn, self.state)


def log_evidence(weights: Sequence[UncertainWeight], precision: float) -> float:
    """Return Laplace's log evidence of a prior N(0, I/λ), but for the log-likelihood at the mode, which λ leaves alone.

    ``½ (P log λ − Σ log(h_i + λ) − λ ‖θ‖²)`` over the P weights with curvatures h_i (MacKay 1992).

    Args:
        weights: their means are the mode θ.
        precision: λ > 0.
    """
    total = 0.0
    for weight in weights:
        # P log λ − Σ log(h + λ) = −Σ log(1 + h/λ): curvatures of 0 drop out, and nothing cancels
        total -= float(torch.log1p(weight.curvature / precision).sum())
        total -= precision * float(weight.mean.square().sum())
    return total / 2


def marginal_likelihood_precision(weights: Sequence[UncertainWeight]) -> float:
    """Return λ of the greatest evidence within 1e-6 and 1e12, to 1e-6 of its logarithm.

    A grid of four points a decade finds the peak, so that several would not mislead; a bounded search ends it.
    """
    low, high = map(math.log, PRECISION_RANGE)
    grid = [low + (high - low) * i / (_GRID_STEPS - 1) for i in range(_GRID_STEPS)]
    values = [log_evidence(weights, math.exp(t)) for t in grid]
    best = values.index(max(values))
    found = optimize.minimize_scalar(
        lambda t: -log_evidence(weights, math.exp(t)),
        bounds=(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(float(found.x))
