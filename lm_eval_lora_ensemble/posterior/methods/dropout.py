"""Dropout at test time, one mask a member (Gal and Ghahramani 2016, arXiv 1506.02142).

    A' = A · diag(m) / (1 − p),    m_i ~ Bernoulli(1 − p), one mask for each layer's inputs

PEFT's layers drop inputs of A, so a mask that is held is an adapter. As published, a mask is drawn anew for each pass;
in a language model that would be each token. One mask for a member is one function, as a member of an ensemble is.
The mean over the masks is the adapter itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.contract import AdapterState, Posterior, Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.lora_layers import carried_names
from lm_eval_lora_ensemble.posterior.moments import wide
from lm_eval_lora_ensemble.posterior.options import Option
from lm_eval_lora_ensemble.posterior.registry import method

_A, _B = ".lora_A.weight", ".lora_B.weight"


class DropoutPosterior(Posterior):
    """The adapter under random masks of its layers' inputs.

    Args:
        adapter: the source.
        p: probability that an input is dropped, between 0 and 1.
    """

    def __init__(self, adapter: SourceAdapter, p: float) -> None:
        self.adapter = adapter
        self.p = p
        self.config = adapter.config
        self.settings: Mapping[str, Any] = {"p": p}

    def draw(self, generator: torch.Generator) -> AdapterState:
        """See :meth:`.contract.Posterior.draw`; A in float32, or wider where the source is."""
        drawn: AdapterState = {}
        for name in sorted(self.adapter.state):
            tensor = self.adapter.state[name]
            if name.endswith(_A):
                keep = torch.rand(tensor.shape[1], generator=generator, dtype=torch.float64) >= self.p
                tensor = tensor.to(wide(tensor.dtype)) * (keep / (1 - self.p)).to(wide(tensor.dtype))
            drawn[name] = tensor
        return drawn


@method(
    name="dropout",
    title="one fixed dropout mask per member and layer",
    needs="adapter",
    source="arXiv 1506.02142",
    options={
        "p": Option(
            None, "share of inputs dropped, above 0 and below 1; the adapter's own lora_dropout", float
        )
    },
)
def fit(source: Source, data: None, *, p: float | None) -> DropoutPosterior:  # noqa: ARG001 - every method's signature
    """Mask the inputs of an adapter's layers.

    Args:
        source: one adapter of plain LoRA on linear layers.
        data: none.
        p: probability that an input is dropped; None takes the adapter's ``lora_dropout``.

    Raises:
        EnsembleError: p is not between 0 and 1, or a mask on A would not be dropout as this adapter has it.
    """
    adapter = source.adapters[0]
    _refuse_other_meanings(adapter)
    own = float(adapter.config.get("lora_dropout") or 0)
    if p is None and own == 0:
        raise EnsembleError(
            f"{adapter.folder} was trained without dropout (lora_dropout is 0), so every draw would be the adapter "
            "itself; give p=, such as p=0.1"
        )
    chosen = own if p is None else p
    if not 0 < chosen < 1:
        raise EnsembleError(f"p={chosen:g}: give a number above 0 and below 1; 0 drops nothing, 1 everything")
    return DropoutPosterior(adapter, chosen)


def _refuse_other_meanings(adapter: SourceAdapter) -> None:
    """Refuse adapters for which a mask on A is something else than dropping the layer's inputs, or only half of it."""
    if adapter.config.get("use_dora"):
        raise EnsembleError(
            f"{adapter.folder} is DoRA, which divides by the norm of W + BA: a mask on A changes that norm, and "
            "dropout in training does not; draw by another method"
        )
    carried = set(carried_names(adapter))  # the base's own, as they are
    other = [
        name for name in adapter.state if not name.endswith((_A, _B, ".lora_B.bias")) and name not in carried
    ]
    if other:
        raise EnsembleError(
            f"{adapter.folder} holds {other[0]}, which is trained without LoRA's dropout, so draws would not "
            "differ there; draw by another method, or train without embeddings, modules_to_save and trainable tokens"
        )
