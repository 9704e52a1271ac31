"""Each draw has a random generator of its own, so that it is the same whichever others are drawn, and when."""

from __future__ import annotations

import hashlib
import json

import torch


def generator_of(seed: int, method: str, sha256: str, number: int) -> torch.Generator:
    """Return the CPU generator of one draw.

    torch's generator on CPUs uses 32 bits of a seed: among n draws two are the same with a probability of n²/2³³, one
    in ten million for thirty.

    Args:
        seed: the user's.
        method: its name.
        sha256: of the source.
        number: of the draw from that source, from 0.

    Example:
        >>> one, same, other = (generator_of(0, "swag", "ab", number) for number in (3, 3, 4))
        >>> draws = [torch.randn(4, generator=generator) for generator in (one, same, other)]
        >>> bool((draws[0] == draws[1]).all()), bool((draws[0] == draws[2]).any())
        (True, False)
    """
    identity = json.dumps([seed, method, sha256, number]).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(identity).digest()[:8], "big"))
