"""The pairs of matrices of one adapter, for methods that put a distribution on A and B of linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lm_eval_lora_ensemble.ensemble.adapters.config import read_config
from lm_eval_lora_ensemble.ensemble.adapters.folder import CONFIG, WEIGHTS
from lm_eval_lora_ensemble.ensemble.adapters.weights import PREFIX, read_weights
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.contract import AdapterState, Source, SourceAdapter, StoredState

A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"


@dataclass(frozen=True)
class LoraPair:
    """A [r, in] and B [out, r] of one linear layer, float64; PEFT adds scaling · B·A to the layer's weight.

    Attributes:
        layer: the layer's name in the base model.
        A: maps the layer's input to r numbers.
        B: maps those to the layer's output.
    """

    layer: str
    A: torch.Tensor
    B: torch.Tensor

    @property
    def a_name(self) -> str:
        """Name of A in the weights file."""
        return f"{PREFIX}{self.layer}{A_SUFFIX}"

    @property
    def b_name(self) -> str:
        """Name of B in the weights file."""
        return f"{PREFIX}{self.layer}{B_SUFFIX}"


def one_adapter(source: Source, method: str) -> SourceAdapter:
    """Return the only adapter of a source.

    Raises:
        EnsembleError: there are several.
    """
    if len(source.adapters) != 1:
        raise EnsembleError(
            f"{method} starts from one adapter and the source has {len(source.adapters)}; choose one with member=K"
        )
    return source.adapters[0]


def lora_pairs(adapter: SourceAdapter, method: str) -> list[LoraPair]:
    """Return an adapter's pairs of matrices, sorted by layer.

    Raises:
        EnsembleError: it has trained anything but the matrices of linear layers, which the method would leave as it is.
    """
    if adapter.config.get("use_dora"):
        raise EnsembleError(
            f"{adapter.name} is a DoRA adapter: its magnitudes divide by ‖W + B·A‖, so noise on A and B is not what "
            f"{method} takes it for; use an adapter trained without use_dora, or the method dropout or swag"
        )
    state = adapter.state
    layers = {
        name.removeprefix(PREFIX).removesuffix(suffix)
        for name in state
        for suffix in (A_SUFFIX, B_SUFFIX)
        if name.endswith(suffix)
    }
    pairs = []
    for layer in sorted(layers):
        tensors = [state.get(f"{PREFIX}{layer}{suffix}") for suffix in (A_SUFFIX, B_SUFFIX)]
        if any(tensor is None or tensor.ndim != 2 for tensor in tensors):
            raise EnsembleError(
                f"{adapter.name}: {layer} is no linear layer's pair of matrices; {method} handles linear layers only"
            )
        A, B = (tensor.double() for tensor in tensors if tensor is not None)
        pairs.append(LoraPair(layer, A, B))
    known = {name for pair in pairs for name in (pair.a_name, pair.b_name)} | set(carried_names(adapter))
    others = sorted(set(state) - known)
    if others or not pairs:
        what = others[0] if others else "no matrices at all"
        raise EnsembleError(
            f"{adapter.name} holds {what}; {method} handles A and B of linear layers only, not embeddings, biases or "
            "modules_to_save: train the adapter without them"
        )
    return pairs


def carried_names(adapter: SourceAdapter) -> list[str]:
    """Return the names of the base model's own tensors in the weights file.

    PEFT saves the embeddings with an adapter of the output head, or of a base whose vocabulary was resized. They are
    not trained, and every draw carries them along.
    """
    weights = read_weights(adapter.folder / WEIGHTS, read_config(adapter.folder / CONFIG), values=False)
    return sorted(weights.names.values())


def as_state(drawn: Mapping[str, torch.Tensor], kept: StoredState) -> AdapterState:
    """Return a weights file's tensors, each with memory of its own.

    Args:
        drawn: stored in float32.
        kept: an adapter whose other tensors are repeated as they are.
    """
    tensors = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in drawn.items()}
    others = {name: kept[name].clone() for name in kept if name not in drawn}
    return {name: tensor.contiguous() for name, tensor in sorted({**tensors, **others}.items())}
