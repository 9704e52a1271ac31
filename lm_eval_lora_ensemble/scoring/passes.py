"""Passes: the trie's sequences in order, cut where little has to be kept.

A pass is a run of neighbouring sequences, written as one tree row: a flat stream of distinct tokens without padding.
What its first sequence shares with the last one of the pass before was computed there; those keys and values are kept,
and are the *prefix* of the new pass. So each position is computed once, with one exception: a position inside the
prefix whose next-token distribution a sequence of the new pass needs is computed again, from there on, so that all that
is known of a request is known in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.tree.requests import TokenRequest
from lm_eval_lora_ensemble.tree.trie import PrefixTrie


@dataclass(frozen=True)
class Pass:
    """Sequences ``[start, stop)`` of the trie; the first ``prefix`` tokens of the first are kept from before."""

    start: int
    stop: int
    prefix: int


class Passes:
    """Cuts the sequences of a trie into passes, one after another.

    Args:
        trie: of ``requests``.
        requests: what is to be scored.
    """

    def __init__(self, trie: PrefixTrie, requests: Sequence[TokenRequest]) -> None:
        self.trie = trie
        targets = [max(len(requests[i].targets) for i in indices) for indices in trie.requests_of]
        # the first position of each sequence whose next-token distribution is needed
        self._first_needed: npt.NDArray[np.int64] = trie.lengths - np.array(targets, dtype=np.int64)

    def take(self, start: int, budget: int) -> Pass:
        """Return the pass that begins with sequence ``start``.

        Args:
            start: its first sequence.
            budget: tokens it may compute; one whole sequence may have more.
        """
        path = prefix = int(self.trie.shared[start])
        best, best_size, best_kept = Pass(start, start, prefix), 0, 0
        for stop in range(start + 1, len(self.trie.sequences) + 1):
            last = stop - 1
            if last > start:
                path = min(path, int(self.trie.shared[last]))
            if self._first_needed[last] < path:
                prefix = min(prefix, int(self._first_needed[last]))
            size = self.trie.size(start, stop, prefix)
            if best_size and size > budget:
                break
            kept = self.shared_with_next(stop)
            # little to keep is better than a full pass, a pass that is half empty is not
            if kept <= best_kept or 2 * best_size < budget:
                best, best_size, best_kept = Pass(start, stop, prefix), size, kept
        return best

    def shared_with_next(self, stop: int) -> int:
        """Return how many tokens the sequence before ``stop`` shares with the one there; 0 at the end."""
        return int(self.trie.shared[stop]) if stop < len(self.trie.sequences) else 0

    def size(self, one: Pass) -> int:
        """Return how many tokens a pass computes."""
        return self.trie.size(one.start, one.stop, one.prefix)


def all_passes(passes: Passes, budget: int) -> Iterator[Pass]:
    """Yield the passes of all sequences under one budget."""
    start = 0
    while start < len(passes.trie.sequences):
        one = passes.take(start, budget)
        yield one
        start = one.stop
