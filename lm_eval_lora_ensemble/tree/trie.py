"""The prefix trie of a set of requests: every distinct token position once.

Two requests share a position when their token sequences agree up to and including it, and then they share
everything a causal model computes there. The trie is kept as the sorted distinct sequences and the length of
the prefix that each shares with the one before it, as a suffix array keeps its suffixes: intervals of the
sorted order are subtrees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.tree.requests import TokenRequest


class PrefixTrie:
    """Distinct token sequences of some requests in lexicographic order, with their shared prefixes.

    Attributes:
        sequences: the distinct ``tokens`` of the requests, sorted.
        shared: int [S]; ``shared[i]`` is the length of the common prefix of sequences i − 1 and i, 0 for i = 0.
        lengths: int [S].
        requests_of: for each sequence, the indices of the requests that have it.
    """

    def __init__(self, requests: Sequence[TokenRequest]) -> None:
        by_sequence: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            by_sequence.setdefault(request.tokens, []).append(index)
        self.sequences = sorted(by_sequence)
        self.requests_of = [by_sequence[sequence] for sequence in self.sequences]
        self.lengths: npt.NDArray[np.int64] = np.array([len(s) for s in self.sequences], dtype=np.int64)
        self.shared: npt.NDArray[np.int64] = np.zeros(len(self.sequences), dtype=np.int64)
        for i in range(1, len(self.sequences)):
            self.shared[i] = common_prefix(self.sequences[i - 1], self.sequences[i])
        self._own_before = np.concatenate([[0], np.cumsum(self.lengths - self.shared)])

    @property
    def n_positions(self) -> int:
        """Number of distinct token positions: the least that any exact method computes per member."""
        return int(self._own_before[-1])

    def size(self, start: int, stop: int, depth: int) -> int:
        """Number of distinct positions at ``depth`` or deeper in sequences ``[start, stop)``.

        ``depth`` must not exceed the prefix that all of them share.
        """
        others = int(self._own_before[stop] - self._own_before[start + 1])
        return int(self.lengths[start]) - depth + others


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    limit = min(len(one), len(other))
    low, high = 0, limit
    # bisection over slices: comparing slices of tuples runs in C, a loop over tokens does not
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
