"""Which floating-point type is fast here: bfloat16 only where the hardware multiplies it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def has_fast_bfloat16(device: str | torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware.

    A CPU without AMX or AVX512-BF16 emulates it, some 30 times slower than float32 (docs/performance.md).
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind == "cpu":
        # torch offers no public query; an absent one means a torch that would not use the instructions
        queries = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, query, lambda: False)() for query in queries)
    return kind != "mps"


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """Return bfloat16 where it is fast, else float32: what ``dtype: auto`` means in training recipes."""
    import torch

    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no wider one."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64
