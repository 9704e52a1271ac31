"""The speed that a model's matrix products could have here: what "of GEMM peak" is a share of."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from machine import timed
from transformers import AutoModelForCausalLM

# (input features, output features) of linear layers, and how many have that shape
LinearShapes = Counter[tuple[int, int]]

# enough tokens to keep the hardware busy, so that more would not be faster
TOKENS = {"cpu": 1024, "accelerator": 8192}
REPEATS = 5


def linear_shapes(model: Any) -> LinearShapes:
    """Count the shapes of a causal model's linear layers: neither adapters' products nor the vocabulary's."""
    head = {id(module) for module in model.get_output_embeddings().modules()}
    return Counter(
        (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in head and "lora_" not in name
    )


def meta_model(config: Any) -> Any:
    """Return a causal model of a configuration that has shapes and no weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def weights(shapes: LinearShapes) -> int:
    """Return the number of weights, each of which a token costs two operations."""
    return sum(inputs * outputs * count for (inputs, outputs), count in shapes.items())


def gemm_peak(shapes: LinearShapes, dtype: torch.dtype, device: str) -> float:
    """Return the FLOP/s at which a pass of ``TOKENS`` tokens goes through linear layers of these shapes.

    Each distinct product runs by itself, and the best of five counts. A shape weighs as much as its operations: the
    result is the model's operations divided by the time they take at each shape's best.
    """
    tokens = TOKENS["cpu" if device == "cpu" else "accelerator"]
    seconds = 0.0
    with torch.inference_mode():
        for (inputs, outputs), count in shapes.items():
            x = torch.randn(tokens, inputs, device=device).to(dtype)
            w = torch.randn(outputs, inputs, device=device).to(dtype)
            torch.nn.functional.linear(x, w)  # the first call also allocates and picks a kernel
            seconds += count * min(
                timed(lambda x=x, w=w: torch.nn.functional.linear(x, w), device)[0] for _ in range(REPEATS)
            )
    return 2 * tokens * weights(shapes) / seconds


def meaning(peak: float, dtype: torch.dtype | str, device: str) -> str:
    """Say in one line what a peak is."""
    tokens = TOKENS["cpu" if device == "cpu" else "accelerator"]
    name = str(dtype).removeprefix("torch.")
    return (
        f"GEMM peak: {peak / 1e12:.3f} TFLOP/s, {name} products of {tokens} tokens at the shapes of this model's "
        f"linear layers, weighted by their operations, best of {REPEATS}"
    )
