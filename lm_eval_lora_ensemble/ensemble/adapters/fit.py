"""An adapter against the base model that is loaded: every tensor has its layer, and every layer its tensors.

PEFT reads adapter files leniently: a tensor it has no place for is dropped, a layer without a tensor keeps an
adapter that does nothing, and a tensor named like one of the base model's own replaces that, under all members.
Each of these would give plausible wrong numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from lm_eval_lora_ensemble.ensemble.adapters.config import read_config
from lm_eval_lora_ensemble.ensemble.adapters.folder import CONFIG, WEIGHTS
from lm_eval_lora_ensemble.ensemble.adapters.weights import PREFIX, Shape, Weights, read_weights
from lm_eval_lora_ensemble.errors import EnsembleError


def check_fit(model: torch.nn.Module, base: str, folders: Sequence[Path]) -> None:
    """Check all members' tensors against the base model, before PEFT changes it.

    Args:
        model: the base model alone.
        base: its name, for messages.
        folders: the members' adapters, each of which ``check_adapter`` has accepted.

    Raises:
        EnsembleError: a tensor has no place in the base model or another shape than its place, or would
            replace one of the base model's own under the other members.
    """
    state = model.state_dict()
    all_weights = [_weights(folder) for folder in folders]
    for folder, weights in zip(folders, all_weights, strict=True):
        for module, shapes in weights.layers.items():
            sizes = _layer_sizes(model, module)
            for kind, shape in shapes.items():
                _compare(folder, base, f"{kind} of {module}", shape, sizes and _expected(kind, shape, *sizes))
        for own, shape in {**weights.saved, **weights.base}.items():
            _compare(folder, base, own, shape, tuple(state[own].shape) if own in state else None)
        for module, shape in weights.tokens.items():
            sizes = _layer_sizes(model, module)
            _compare(folder, base, f"trained rows of {module}", shape, sizes and (shape[0], sizes[1]))
    for own in sorted({own for weights in all_weights for own in weights.base}):
        _check_carried(own, state[own], base, folders, all_weights)


def check_loaded(model: torch.nn.Module, adapter: str, folder: Path) -> None:
    """Check that PEFT adapted the layers that the adapter's file is about, no more and no fewer.

    Args:
        model: the ``PeftModel``.
        adapter: PEFT's name of the adapter.
        folder: where it was loaded from.

    Raises:
        EnsembleError: some layer would be scored without the member's weights.
    """
    adapted = set()
    for name, _ in model.named_parameters():
        for suffix in (f".lora_A.{adapter}.weight", f".lora_embedding_A.{adapter}"):
            if name.endswith(suffix):
                adapted.add(name.removesuffix(suffix).removeprefix(PREFIX))
    odd = sorted(adapted ^ set(_weights(folder).layers))
    if odd:
        lacks = "lacks the weights of" if odd[0] in adapted else "has weights, which PEFT does not load, of"
        raise EnsembleError(
            f"{folder} {lacks} {odd[0]} ({len(odd)} such layers); its configuration and weights do not belong "
            "together: export the adapter again"
        )


def _weights(folder: Path) -> Weights:
    return read_weights(folder / WEIGHTS, read_config(folder / CONFIG), values=False)


def _layer_sizes(model: torch.nn.Module, module: str) -> tuple[int, int] | None:
    """Return a layer's (in, out) or an embedding's (vocabulary, dim); None if the model has no such layer."""
    try:
        layer = model.get_submodule(module)
    except AttributeError:
        return None
    if isinstance(layer, torch.nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    # quantised layers are no torch.nn.Linear, but say the same of themselves
    inputs, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (int(inputs), int(outputs)) if inputs and outputs else None


def _expected(kind: str, shape: Shape, inputs: int, outputs: int) -> Shape:
    """Return the shape a LoRA tensor must have on a layer of these sizes, with the rank it has."""
    return {
        "A": (shape[0], inputs),
        "B": (outputs, shape[-1]),
        "embedding_A": (shape[0], inputs),
        "embedding_B": (outputs, shape[-1]),
        "magnitude": (outputs,),
        "bias": (outputs,),
    }[kind]


def _compare(folder: Path, base: str, what: str, shape: Shape, expected: Shape | None) -> None:
    if expected is None:
        raise EnsembleError(
            f"{folder} holds {what}, which the base model {base} does not have; name the base model it was trained on"
        )
    if shape != expected:
        raise EnsembleError(
            f"{folder}: {what} has shape {shape}, the base model {base} needs {expected}; "
            "name the base model it was trained on"
        )


def _check_carried(
    own: str, parameter: torch.Tensor, base: str, folders: Sequence[Path], all_weights: Sequence[Weights]
) -> None:
    """Check that loading the parameter ``own`` from the members' files changes it for none of the others.

    PEFT saves adapted or resized embeddings along with the adapter. That is harmless if they are the base
    model's, or if all members bring the same.
    """
    carried = {
        folder: _tensor(folder, weights.names[own])
        for folder, weights in zip(folders, all_weights, strict=True)
        if own in weights.names
    }
    first = next(iter(carried.values()))
    if len(carried) == len(folders) and all(torch.equal(first, tensor) for tensor in carried.values()):
        return
    for folder, tensor in carried.items():
        if not _same_values(tensor, parameter.cpu()):
            raise EnsembleError(
                f"{folder} brings its own {own}, other than that of {base}, which would replace it under every member; "
                "save it with save_embedding_layers=False, or evaluate the adapter alone"
            )


def _tensor(folder: Path, name: str) -> torch.Tensor:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, or one is the other rounded to its type."""
    return torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)
