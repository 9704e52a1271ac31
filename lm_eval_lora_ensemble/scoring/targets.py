"""Which positions of a pass are projected on the vocabulary, and for which targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.tree.requests import TokenRequest
from lm_eval_lora_ensemble.tree.rows import TreeRow
from lm_eval_lora_ensemble.tree.trie import PrefixTrie

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PassTargets:
    """The targets of a pass's requests, request by request, and the distinct positions that predict them.

    Attributes:
        requests: int [Q], the requests that the pass answers.
        first: int [Q + 1]; the targets of the i-th of them are ``[first[i], first[i + 1])``.
        place: int [R], the distinct positions, as places of the pass's row.
        position: int [K], for each target the index of its position in ``place``.
        target: int [K], the tokens.
    """

    requests: IntArray
    first: IntArray
    place: IntArray
    position: IntArray
    target: IntArray

    @property
    def owner(self) -> IntArray:
        """For each target the index of its request in ``requests``."""
        return np.repeat(np.arange(len(self.requests)), np.diff(self.first))


def collect_targets(trie: PrefixTrie, row: TreeRow, requests: Sequence[TokenRequest]) -> PassTargets:
    """Collect what the requests of a row's sequences ask for.

    Args:
        trie: of ``requests``.
        row: whole sequences of it.
        requests: all requests.
    """
    indices: list[int] = []
    places: list[IntArray] = []
    targets: list[tuple[int, ...]] = []
    for sequence, path in row.paths.items():
        for index in trie.requests_of[sequence]:
            indices.append(index)
            targets.append(requests[index].targets)
            places.append(path[len(path) - len(requests[index].targets) :])
    place, position = np.unique(np.concatenate(places), return_inverse=True)
    return PassTargets(
        requests=np.array(indices, dtype=np.int64),
        first=np.concatenate([[0], np.cumsum([len(each) for each in targets])]),
        place=place,
        position=position.reshape(-1),
        target=np.concatenate([np.array(each, dtype=np.int64) for each in targets]),
    )
