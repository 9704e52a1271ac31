"""Token requests: what a continuation and its context are to a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class TokenRequest(NamedTuple):
    """One continuation to score after its context.

    Attributes:
        tokens: model input, ``(context + continuation)[:-1]`` after left truncation. For an
            encoder–decoder, the encoder's input.
        targets: the continuation's tokens; the last ``len(targets)`` positions of ``tokens`` predict them.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


def truncate(context: Sequence[int], continuation: Sequence[int], max_length: int) -> TokenRequest:
    """Make a request as lm-eval's ``hf`` does: keep the last ``max_length + 1`` tokens, drop the very last.

    Raises:
        ValueError: the context is empty, or the continuation is empty or longer than ``max_length``.
    """
    if not context:
        raise ValueError("a context needs at least one token")
    if not 0 < len(continuation) <= max_length:
        raise ValueError(f"a continuation needs 1 to {max_length} tokens, not {len(continuation)}")
    whole = (*context, *continuation)[-(max_length + 1) :]
    return TokenRequest(whole[:-1], tuple(continuation))
