"""Which prompts are decoded together, and how many tokens of their beginnings they share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

# a beginning worth its own pass
_LEAST_SHARED = 16


class Batch(NamedTuple):
    """Prompts that are decoded together.

    Attributes:
        prompts: their indices, longest first.
        shared: number of tokens that all of them begin with and that are computed once; none is a whole prompt.
    """

    prompts: list[int]
    shared: int


def plan(prompts: Sequence[Sequence[int]], batch_size: int, *, share: bool) -> list[Batch]:
    """Put prompts into batches of at most ``batch_size``.

    Prompts that begin alike, such as those of one task, go together where they fill a batch: what they share is
    computed once. Within such a family the longest come first, as with lm-eval's ``hf``.

    Args:
        prompts: token ids.
        batch_size: prompts in a batch.
        share: whether beginnings may be shared.

    Example:
        >>> plan([[1, 2, 3], [1, 2], [7, 8]], 2, share=False)
        [Batch(prompts=[0, 1], shared=0), Batch(prompts=[2], shared=0)]
    """
    batches = []
    for family, shared in _families(prompts, batch_size) if share else [(list(range(len(prompts))), 0)]:
        ordered = sorted(family, key=lambda i: (-len(prompts[i]), i))
        batches += [
            Batch(ordered[start : start + batch_size], shared) for start in range(0, len(ordered), batch_size)
        ]
    return batches


def _families(prompts: Sequence[Sequence[int]], batch_size: int) -> list[tuple[list[int], int]]:
    """Part the trie of the prompts where a branch fills a batch; return each part with its common length."""
    found = []
    todo = [list(range(len(prompts)))]
    while todo:
        members = todo.pop()
        shared = _common(prompts, members)
        branches: dict[int, list[int]] = defaultdict(list)
        for i in members:
            branches[prompts[i][shared]].append(i)
        large = [
            branch
            for branch in branches.values()
            if batch_size <= len(branch) < len(members) and _common(prompts, branch) >= shared + _LEAST_SHARED
        ]
        todo += large
        rest = sorted(set(members) - {i for branch in large for i in branch})
        if rest:
            # with fewer prompts than the whole they may share more
            common = _common(prompts, rest)
            found.append((rest, common if common >= _LEAST_SHARED and len(rest) > 1 else 0))
    return found


def _common(prompts: Sequence[Sequence[int]], members: Sequence[int]) -> int:
    """Return how many tokens all begin with, less than the shortest has."""
    first, last = (pick((prompts[i] for i in members), key=tuple) for pick in (min, max))
    limit = min(len(prompts[i]) for i in members) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)
