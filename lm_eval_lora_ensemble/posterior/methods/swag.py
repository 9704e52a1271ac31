"""SWAG: a Gaussian through the snapshots of one run (Maddox 2019, arXiv 1902.02476), and one of every member.

    θ = θ̄ + √scale · (√var ∘ z₁ + Dᵀ z₂ / √(K − 1)),    z₁ ~ N(0, I), z₂ ~ N(0, I_K)

θ̄ is the mean of the T snapshots and var their variance, element by element. Row k of D is a deviation: what one of
the last K snapshots was away from the mean *of those until then*, itself included, as the paper's algorithm collects
it. z₂ is one draw for the whole adapter. The paper halves the sum of both covariances, which is scale = ½, the default;
scale = 0 is the mean alone, SWA.

A and B are plain parameters, each with its own mean and deviations, as are trained magnitudes and modules saved whole.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lm_eval_lora_ensemble.posterior.contract import AdapterState, Posterior, Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.methods.swa import LAST
from lm_eval_lora_ensemble.posterior.moments import last_of, running_means, wide
from lm_eval_lora_ensemble.posterior.options import Option
from lm_eval_lora_ensemble.posterior.registry import method

OPTIONS = {
    "K": Option(5, "deviations kept: rank of the covariance beside its diagonal", minimum=2),
    "scale": Option(0.5, "of the covariance; 0.5 is the paper's, 0 is SWA", minimum=0),
    "last": LAST,
}


@dataclass(frozen=True)
class Moments:
    """What SWAG keeps of one tensor.

    Attributes:
        mean: θ̄, of the tensor's shape.
        deviation: √var, of the same shape.
        D: [K, …], the last deviations from the running mean.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    D: torch.Tensor

    @classmethod
    def of(cls, values: Sequence[torch.Tensor], rank: int) -> Moments:
        """Collect them from a tensor's values in the snapshots, in order; sums are in float64.

        Args:
            values: at least two of one shape.
            rank: K.
        """
        squares, before = None, None
        deviations: deque[torch.Tensor] = deque(maxlen=rank)
        for value, mean in running_means(values):
            deviations.append(value - mean)
            # Welford: no difference of two large squares
            step = (value - (value if before is None else before)) * (value - mean)
            squares = step if squares is None else squares + step
            before = mean
        assert squares is not None and before is not None
        dtype = wide(values[0].dtype)
        return cls(
            before.to(dtype),
            (squares / len(values)).clamp_min(0).sqrt().to(dtype),
            torch.stack(tuple(deviations)).to(dtype),
        )


class SwagPosterior(Posterior):
    """N(θ̄, scale · (diag(var) + DᵀD / (K − 1))) over all tensors of an adapter.

    Args:
        moments: by tensor.
        scale: of the covariance.
        config: adapter_config.json.
        settings: for the manifest.
    """

    def __init__(
        self,
        moments: Mapping[str, Moments],
        scale: float,
        config: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        self.moments = moments
        self.scale = scale
        self.config = config
        self.settings = settings

    def draw(self, generator: torch.Generator) -> AdapterState:
        """See :meth:`.contract.Posterior.draw`; float32, whatever the snapshots are stored in."""
        rank = len(next(iter(self.moments.values())).D)
        weights = torch.randn(rank, generator=generator, dtype=torch.float64) / math.sqrt(rank - 1)
        return {name: self._one(self.moments[name], weights, generator) for name in sorted(self.moments)}

    def _one(self, of: Moments, weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(of.mean.shape, generator=generator, dtype=of.mean.dtype)
        low_rank = torch.tensordot(weights.to(of.D.dtype), of.D, dims=1)
        return of.mean + math.sqrt(self.scale) * (of.deviation * noise + low_rank)


@method(
    name="swag",
    title="Gaussian through the snapshots of one run",
    needs="snapshots",
    source="arXiv 1902.02476",
    options=OPTIONS,
)
def fit(source: Source, data: None, *, K: int, scale: float, last: int | None) -> SwagPosterior:  # noqa: ARG001
    """Fit SWAG's Gaussian to the snapshots of one run.

    Args:
        source: the snapshots, in the order of training.
        data: none.
        K: deviations kept, at most as many as there are snapshots.
        scale: of the covariance.
        last: use only so many snapshots, the last ones.

    Raises:
        EnsembleError: fewer snapshots than K.
    """
    taken = last_of(source, last, at_least=K, method=f"swag with K={K}")
    names = taken[0].state
    moments = {name: Moments.of(_values(taken, name), K) for name in names}
    settings = {"scale": scale, "K": K, "snapshots": len(taken)}
    return SwagPosterior(moments, scale, taken[0].config, settings)


def _values(snapshots: Sequence[SourceAdapter], name: str) -> list[torch.Tensor]:
    return [snapshot.state[name] for snapshot in snapshots]


@method(
    name="multiswag",
    title="SWAG of every member of an ensemble, each with its share of the draws",
    needs="snapshots",
    source="arXiv 2002.08791",
    every_member=True,
    options=OPTIONS,
)
def fit_each(source: Source, data: None, *, K: int, scale: float, last: int | None) -> SwagPosterior:
    """Fit SWAG to one member of an ensemble; see :func:`fit`."""
    return fit(source, data, K=K, scale=scale, last=last)
