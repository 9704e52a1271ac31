"""Where a text ends: the tokens that make it, of all that were generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

Decode = Callable[[Sequence[int]], str]


class StopStrings:
    """Whether the last tokens of a text complete a stop string, as lm-eval's ``hf`` asks it.

    Args:
        strings: stop strings; empty ones stop nothing.
        encode: text to tokens, without special ones.
        decode: tokens to text, special ones included.
    """

    def __init__(
        self, strings: Sequence[str], encode: Callable[[str], Sequence[int]], decode: Decode
    ) -> None:
        self._strings = [string for string in strings if string]
        self._decode = decode
        # two tokens more than it takes: a text may put a stop string together otherwise than its own encoding
        self._window = 2 + max((len(encode(string)) for string in self._strings), default=0)

    def reached(self, generated: Sequence[int]) -> bool:
        """Whether the generated tokens have just completed a stop string."""
        if not self._strings:
            return False
        tail = self._decode(generated[-self._window :])
        return any(string in tail for string in self._strings)


class Kept(NamedTuple):
    """What is left of a generated text.

    Attributes:
        text: as lm-eval's ``hf`` returns it.
        start, stop: its tokens, the one that ended it included.
        cut: whether a stop string was taken off.
    """

    text: str
    start: int
    stop: int
    cut: bool


def kept_part(
    generated: Sequence[int], decode: Decode, strings: Sequence[str], think_end: int | str | None
) -> Kept:
    """Take a thought and what follows a stop string off a generated text.

    Args:
        generated: token ids.
        decode: tokens to text, special ones skipped.
        strings: stop strings.
        think_end: token id or text that ends a thought; the answer is what follows its last occurrence.
    """
    thought = 0
    if isinstance(think_end, int):
        thought = max((i + 1 for i, token in enumerate(generated) if token == think_end), default=0)
    answer = generated[thought:]
    whole = decode(answer)
    begin = 0
    if isinstance(think_end, str) and think_end and think_end in whole:
        begin = whole.rindex(think_end) + len(think_end)
    start = thought + (_tokens_for(answer, decode, begin) if begin else 0)
    text = whole[begin:] if think_end in (None, "") else whole[begin:].lstrip()
    begin = len(whole) - len(text)
    for string in filter(None, strings):
        text = text.split(string)[0]
    cut = begin + len(text) < len(whole)
    # the token with which the text goes on past its end is the one that ended it
    length = _tokens_for(answer, decode, begin + len(text) + 1) if cut else len(answer)
    return Kept(text, start, max(start, thought + length), cut)


def _tokens_for(tokens: Sequence[int], decode: Decode, characters: int) -> int:
    """Return how many of the tokens it takes for a text of so many characters."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if len(decode(tokens[:middle])) >= characters:
            high = middle
        else:
            low = middle + 1
    return low
