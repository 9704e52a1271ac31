"""Which positions of a batch are projected on the vocabulary, and for which targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.tree.requests import TokenRequest
from lm_eval_lora_ensemble.tree.rows import TreeRow
from lm_eval_lora_ensemble.tree.trie import PrefixTrie

IntArray = npt.NDArray[np.int64]


class TargetSlots:
    """One slot for every target of every request, in order: where its log-probability goes.

    Attributes:
        first: int [requests + 1], the first slot of each request.
        owner: int [slots], the request of each slot.
        done: bool [slots], whether its log-probability is there.
    """

    def __init__(self, requests: Sequence[TokenRequest]) -> None:
        sizes = np.array([len(request.targets) for request in requests], dtype=np.int64)
        self.first: IntArray = np.concatenate([[0], np.cumsum(sizes)])
        self.owner: IntArray = np.repeat(np.arange(len(requests)), sizes)
        self.done: npt.NDArray[np.bool_] = np.zeros(len(self.owner), dtype=bool)
        self._missing = sizes

    def __len__(self) -> int:
        return len(self.owner)

    def of(self, request: int) -> slice:
        """Return the slots of a request."""
        return slice(int(self.first[request]), int(self.first[request + 1]))

    def finish(self, slots: IntArray) -> list[int]:
        """Note that these slots, none of them done before, are filled; return the requests that are complete now."""
        self.done[slots] = True
        owners, counts = np.unique(self.owner[slots], return_counts=True)
        self._missing[owners] -= counts
        complete: list[int] = owners[self._missing[owners] == 0].tolist()
        return complete


@dataclass(frozen=True)
class BatchTargets:
    """Positions of a batch whose next-token distributions are needed, and for which targets.

    Attributes:
        row, position: int [R], the distinct positions.
        pair_position: int [K], for each (position, target) pair the index of its position in the above.
        pair_target: int [K].
        pair_slot: int [K], the pair's slot.
    """

    row: IntArray
    position: IntArray
    pair_position: IntArray
    pair_target: IntArray
    pair_slot: IntArray


def collect_targets(
    trie: PrefixTrie,
    rows: Sequence[TreeRow],
    depth: int,
    requests: Sequence[TokenRequest],
    slots: TargetSlots,
) -> BatchTargets:
    """Collect what the requests of ``rows`` still need from positions at ``depth`` or deeper.

    Args:
        trie: of ``requests``.
        rows: a batch.
        depth: the end of the batch's prefix.
        requests: all requests.
        slots: of ``requests``; those that are done are left out.
    """
    distinct: dict[tuple[int, int], int] = {}
    pairs: list[tuple[int, int, int]] = []
    for i, row in enumerate(rows):
        for sequence, path in row.paths.items():
            for index in trie.requests_of[sequence]:
                targets = requests[index].targets
                before = int(trie.lengths[sequence]) - len(targets)
                for t, target in enumerate(targets):
                    slot = int(slots.first[index]) + t
                    at = before + t - depth
                    if at < 0 or at >= len(path) or slots.done[slot]:
                        continue
                    key = (i, int(path[at]))
                    pairs.append((distinct.setdefault(key, len(distinct)), target, slot))
    places = np.array(list(distinct), dtype=np.int64).reshape(-1, 2)
    table = np.array(pairs, dtype=np.int64).reshape(-1, 3)
    return BatchTargets(places[:, 0], places[:, 1], table[:, 0], table[:, 1], table[:, 2])
