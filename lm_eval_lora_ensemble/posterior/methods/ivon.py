"""Draws from the Gaussian that IVON learnt while it trained an adapter.

Shen et al. 2024 (arXiv 2402.17641). ``optimizer: ivon`` in a recipe leaves, beside the adapter m, its estimate h of the
loss's Hessian; every element of A and B is drawn from N(m, 1 / (ess · (h + δ))). The training is in ``train/ivon.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.contract import AdapterState, Posterior, Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.options import Option
from lm_eval_lora_ensemble.posterior.registry import method
from lm_eval_lora_ensemble.train.ivon import standard_deviation
from lm_eval_lora_ensemble.train.posterior_state import FILE_NAME, PosteriorState, identity


@method(
    name="ivon",
    title="the Gaussian that the optimiser IVON trained",
    needs="state",
    source="arXiv 2402.17641",
    options={
        "ess": Option(
            None,
            "effective sample size, the inverse of all variances' common factor; the one that it was trained with",
            float,
        )
    },
)
def fit(source: Source, data: None, *, ess: float | None = None) -> IvonPosterior:  # noqa: ARG001 - every method's signature
    """Read the Gaussian that was trained with an adapter.

    Args:
        source: one adapter trained with ``optimizer: ivon``.
        data: none is needed.
        ess: another effective sample size than training's; more makes all draws closer to the mean.

    Raises:
        EnsembleError: the adapter has no such state beside it, or ess is not above 0.
    """
    if ess is not None and not ess > 0:
        raise EnsembleError(
            f"ess={ess:g}: give a number above 0, such as 1e7, or leave it out for training's"
        )
    adapter = source.adapters[0]
    return IvonPosterior(adapter, PosteriorState.read(adapter.folder, "ivon", adapter.state), ess)


class IvonPosterior(Posterior):
    """A Gaussian with independent elements around an adapter.

    Args:
        adapter: the mean.
        trained: what IVON left beside it.
        ess: instead of training's.

    Raises:
        EnsembleError: a variance of it is not a positive number.
    """

    def __init__(self, adapter: SourceAdapter, trained: PosteriorState, ess: float | None) -> None:
        self.adapter = adapter
        self.config: Mapping[str, Any] = adapter.config
        self._hessian = trained.tensors
        decay = trained.settings.get("weight_decay", math.nan)
        used = trained.settings.get("ess", math.nan) if ess is None else ess
        least = min((float(h.min()) for h in self._hessian.values()), default=math.nan)
        if not (used * (least + decay) > 0 and set(self._hessian) == set(adapter.state)):
            raise EnsembleError(
                f"{adapter.folder / FILE_NAME} gives no positive variance of every weight; copy the folder again or "
                "train it again"
            )
        self._decay = decay
        self.settings: Mapping[str, Any] = {
            "ess": used,
            "weight_decay": decay,
            "state": identity(adapter.folder),
        }

    def draw(self, generator: torch.Generator) -> AdapterState:
        """Draw one adapter: one stream of normal numbers over the tensors in the order of their names."""
        names = sorted(self.adapter.state)
        means = {name: self.adapter.state[name] for name in names}
        noise = torch.randn(sum(mean.numel() for mean in means.values()), generator=generator)
        draw, start = {}, 0
        for name, mean in means.items():
            deviation = standard_deviation(self._hessian[name], self.settings["ess"], self._decay)
            own = noise[start : start + mean.numel()].view(mean.shape)
            draw[name] = (mean.float() + own * deviation).to(mean.dtype)
            start += mean.numel()
        return draw
