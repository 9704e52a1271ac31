"""Rows: a subtree of the trie written as one sequence, with one integer a token that says who may see it.

In depth-first order the descendants of a token are the interval behind it. With ``end`` the first place behind a
token's descendants, a query q sees a key k if and only if ::

    k <= q < end[k]

that is, if k is q's ancestor or q itself. The same integer makes the mask of a chain (every end is the row's length:
plain causality), of a document with its choices, and of padding (each place ends behind itself: it sees itself alone,
so that its softmax is no NaN, and no real token sees it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lm_eval_lora_ensemble.tree.trie import PrefixTrie

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TreeRow:
    """Sequences ``[start, stop)`` of a trie from position ``depth`` on, each distinct position once.

    Attributes:
        tokens: int [L].
        positions: int [L], each token's position in its own sequence; the first is the row's depth.
        end: int [L], the first place in the row behind each token's descendants.
        paths: for each sequence of the row, the places of its tokens from the row's depth on.
    """

    tokens: IntArray
    positions: IntArray
    end: IntArray
    paths: dict[int, IntArray]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every token sees all those before it, as in an ordinary sequence."""
        return bool((self.end == len(self.tokens)).all())


def lay_out(trie: PrefixTrie, start: int, stop: int, depth: int = 0) -> TreeRow:
    """Write some sequences of ``trie`` depth first: the new tokens of each follow those of the one before.

    Args:
        trie: whose order is that of the sequences.
        start: the first of a run of sequences that agree up to ``depth``.
        stop: the first behind them.
        depth: tokens before it belong to a prefix that is kept elsewhere.
    """
    length = trie.size(start, stop, depth)
    tokens, positions, end = (np.empty(length, dtype=np.int64) for _ in range(3))
    paths: dict[int, IntArray] = {}
    path = np.empty(0, dtype=np.int64)
    filled = 0
    for i in range(start, stop):
        kept = 0 if i == start else max(int(trie.shared[i]) - depth, 0)
        own = trie.sequences[i][depth + kept :]
        new = np.arange(filled, filled + len(own))
        tokens[new], positions[new] = own, depth + kept + np.arange(len(own))
        end[path[kept:]] = filled  # what this sequence does not share has no further descendants
        path = np.concatenate([path[:kept], new])
        paths[i] = path
        filled += len(own)
    end[path] = filled
    return TreeRow(tokens, positions, end, paths)


def chain(tokens: Sequence[int], depth: int = 0, sequences: Sequence[int] = (0,)) -> TreeRow:
    """Write one piece of a sequence, from position ``depth`` on, as a row that the given sequences pass through."""
    places = np.arange(len(tokens))
    end = np.full(len(tokens), len(tokens), dtype=np.int64)
    return TreeRow(np.asarray(tokens, dtype=np.int64), depth + places, end, dict.fromkeys(sequences, places))


@dataclass(frozen=True)
class RowBatch:
    """Rows side by side, padded on the right.

    Attributes:
        input_ids: int64 [R, L], 0 in padding, which no real token sees.
        position_ids: int64 [R, L], 0 in padding.
        end: int64 [R, L], see :class:`TreeRow`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    end: torch.Tensor

    @classmethod
    def pad(cls, rows: Sequence[TreeRow], length: int | None = None) -> RowBatch:
        """Pad ``rows`` to ``length`` tokens, by default the longest row's."""
        length = max(map(len, rows)) if length is None else length
        input_ids, position_ids = (np.zeros((len(rows), length), dtype=np.int64) for _ in range(2))
        end = np.tile(np.arange(1, length + 1), (len(rows), 1))
        for i, row in enumerate(rows):
            input_ids[i, : len(row)], position_ids[i, : len(row)] = row.tokens, row.positions
            end[i, : len(row)] = row.end
        return cls(*map(torch.from_numpy, (input_ids, position_ids, end)))

    def to(self, device: torch.device) -> RowBatch:
        """Return the batch on ``device``."""
        return RowBatch(self.input_ids.to(device), self.position_ids.to(device), self.end.to(device))

    def attention_mask(self, dtype: torch.dtype, prefix: int = 0) -> torch.Tensor:
        """Return the additive mask [R, 1, L, prefix + L]: 0 where a token may look, else the least value of ``dtype``.

        Additive, not boolean: eager attention adds what it is given, and would add 1 and 0.

        Args:
            dtype: of the model's hidden states.
            prefix: tokens of a kept prefix before the rows, which every token sees.
        """
        blocked = ~interval_mask(self.end)
        mask = torch.zeros(
            (*blocked.shape[:2], prefix + blocked.shape[2]), dtype=dtype, device=blocked.device
        )
        mask[..., prefix:].masked_fill_(blocked, torch.finfo(dtype).min)
        return mask[:, None]


def interval_mask(end: torch.Tensor) -> torch.Tensor:
    """Return bool [..., L, L]: query q (last axis but one) sees key k (last axis), from ``end`` [..., L]."""
    places = torch.arange(end.shape[-1], device=end.device)
    return (places <= places[:, None]) & (places[:, None] < end[..., None, :])
