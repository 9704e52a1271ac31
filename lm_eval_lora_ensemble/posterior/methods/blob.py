"""Draws from the Gaussian over A that BLoB trained, B being a point.

Wang et al. 2024 (arXiv 2406.11675). ``posterior: blob`` in a recipe leaves an adapter with M in the place of A, and
beside it a matrix G for each M; A is drawn from N(M, Ω²) with Ω = G², element by element. The training is in
``train/blob.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.contract import AdapterState, Posterior, Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.registry import method
from lm_eval_lora_ensemble.train.blob import is_a
from lm_eval_lora_ensemble.train.posterior_state import FILE_NAME, PosteriorState, identity


@method(
    name="blob",
    title="the Gaussian over A that BLoB trained",
    needs="state",
    source="arXiv 2406.11675",
)
def fit(source: Source, data: None) -> BlobPosterior:  # noqa: ARG001 - every method's signature
    """Read the Gaussian that was trained with an adapter.

    Args:
        source: one adapter trained with ``posterior: blob``.
        data: none is needed.

    Raises:
        EnsembleError: the adapter has no such state beside it.
    """
    adapter = source.adapters[0]
    return BlobPosterior(adapter, PosteriorState.read(adapter.folder, "blob", adapter.state))


class BlobPosterior(Posterior):
    """A Gaussian with independent elements around every A of an adapter.

    Args:
        adapter: M and B.
        trained: what BLoB left beside it.

    Raises:
        EnsembleError: it does not tell the deviations of every A.
    """

    def __init__(self, adapter: SourceAdapter, trained: PosteriorState) -> None:
        self.adapter = adapter
        self.config: Mapping[str, Any] = adapter.config
        self._roots = trained.tensors
        if set(self._roots) != {name for name in adapter.state if is_a(name)}:
            raise EnsembleError(
                f"{adapter.folder / FILE_NAME} is not of every A of the adapter beside it; copy the folder again or "
                "train it again"
            )
        deviations = [float(root.square().mean()) for root in self._roots.values()]
        self.settings: Mapping[str, Any] = {
            "mean_deviation": sum(deviations) / max(1, len(deviations)),
            "prior_deviation": trained.settings.get("prior"),
            "state": identity(adapter.folder),
        }

    def draw(self, generator: torch.Generator) -> AdapterState:
        """Draw one adapter: M + Ω ∘ ε in the place of each A, in the order of the names; B as it is."""
        draw = {}
        for name in sorted(self.adapter.state):
            tensor = self.adapter.state[name]
            if name in self._roots:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor = (tensor.float() + self._roots[name].square() * noise).to(tensor.dtype)
            draw[name] = tensor.clone()
        return draw
