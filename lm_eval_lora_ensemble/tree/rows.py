"""Rows as tensors: tokens, depths, who attends to whom, and which positions answer which request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lm_eval_lora_ensemble.scoring.plan import Row
from lm_eval_lora_ensemble.tree.requests import TokenRequest
from lm_eval_lora_ensemble.tree.trie import PrefixTrie


@dataclass(frozen=True)
class TreeRow:
    """One row laid out.

    Attributes:
        tokens: int [L].
        depths: int [L], each token's position in its own sequence; the row's first depth is the prefix's end.
        mask: bool [L, L]; row token q attends to row token k. None for a plain chain, where that is k ≤ q.
        paths: for each sequence of the row, the row positions of its tokens from the prefix's end on.
    """

    tokens: npt.NDArray[np.int64]
    depths: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_] | None
    paths: dict[int, npt.NDArray[np.int64]]


def lay_out(trie: PrefixTrie, row: Row) -> TreeRow:
    """Write a subtree as one sequence, depth first; a sequence's new tokens follow those of the one before."""
    tokens = np.empty(row.length, dtype=np.int64)
    depths = np.empty(row.length, dtype=np.int64)
    mask = np.zeros((row.length, row.length), dtype=bool) if row.stop - row.start > 1 else None
    paths: dict[int, npt.NDArray[np.int64]] = {}
    path = np.empty(0, dtype=np.int64)
    filled = 0
    for i in range(row.start, row.stop):
        kept = 0 if i == row.start else max(int(trie.shared[i]) - row.depth, 0)
        own = trie.sequences[i][row.depth + kept :]
        new = np.arange(filled, filled + len(own))
        tokens[new], depths[new] = own, row.depth + kept + np.arange(len(own))
        path = np.concatenate([path[:kept], new])
        if mask is not None:
            mask[np.ix_(new, path[:kept])] = True
            mask[np.ix_(new, new)] = np.tri(len(new), dtype=bool)
        paths[i] = path
        filled += len(own)
    return TreeRow(tokens, depths, mask, paths)


@dataclass
class PackedInput:
    """A batch of rows on one prefix of P tokens.

    Attributes:
        input_ids, position_ids: int64 [B, L], zero where a row is shorter.
        attention_mask: additive [B, 1, L, P + L] in the model's dtype, or None for chains on no prefix, which
            need nothing but causality.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None

    @property
    def n_computed(self) -> int:
        """Token positions this batch computes, padding included."""
        return self.input_ids.numel()


def pack(rows: Sequence[TreeRow], prefix: int, dtype: torch.dtype, device: torch.device) -> PackedInput:
    """Pad rows to one length and build their mask."""
    length = max(len(row.tokens) for row in rows)
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    position_ids = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.tokens)] = row.tokens
        position_ids[i, : len(row.tokens)] = row.depths
    mask = None
    if prefix or any(row.mask is not None for row in rows):
        allowed = np.zeros((len(rows), 1, length, prefix + length), dtype=bool)
        allowed[..., :prefix] = True
        for i, row in enumerate(rows):
            n = len(row.tokens)
            allowed[i, 0, :n, prefix : prefix + n] = np.tri(n, dtype=bool) if row.mask is None else row.mask
        # padding attends to itself: a row of nothing but −inf would turn into NaN
        allowed[:, :, range(length), range(prefix, prefix + length)] = True
        mask = torch.zeros(allowed.shape, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(~allowed), torch.finfo(dtype).min)
        mask = mask.to(device)
    return PackedInput(
        torch.from_numpy(input_ids).to(device), torch.from_numpy(position_ids).to(device), mask
    )


@dataclass(frozen=True)
class Wanted:
    """Positions of a batch whose next-token distributions are needed, and for which targets.

    Attributes:
        row, position: int [R], the distinct positions.
        pair_position: int [K], for each (position, target) pair the index of its position in the above.
        pair_target: int [K].
        pair_slot: int [K], where the pair's log-probability belongs among all targets of all requests.
    """

    row: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    pair_position: npt.NDArray[np.int64]
    pair_target: npt.NDArray[np.int64]
    pair_slot: npt.NDArray[np.int64]


def wanted(
    trie: PrefixTrie,
    rows: Sequence[TreeRow],
    depth: int,
    requests: Sequence[TokenRequest],
    first_slot: npt.NDArray[np.int64],
    done: npt.NDArray[np.bool_],
) -> Wanted:
    """Collect what the requests of ``rows`` need from positions at ``depth`` or deeper.

    Args:
        trie: of ``requests``.
        rows: a batch.
        depth: the end of the batch's prefix.
        requests: all requests.
        first_slot: int [len(requests)], the slot of each request's first target.
        done: bool [slots], targets that have their log-probability from an earlier batch.
    """
    distinct: dict[tuple[int, int], int] = {}
    pairs: list[tuple[int, int, int]] = []
    for i, row in enumerate(rows):
        for sequence, path in row.paths.items():
            for index in trie.requests_of[sequence]:
                targets = requests[index].targets
                before = int(trie.lengths[sequence]) - len(targets)
                for t, target in enumerate(targets):
                    slot = int(first_slot[index]) + t
                    at = before + t - depth
                    if at < 0 or at >= len(path) or done[slot]:
                        continue
                    key = (i, int(path[at]))
                    pairs.append((distinct.setdefault(key, len(distinct)), target, slot))
    places = np.array(list(distinct), dtype=np.int64).reshape(-1, 2)
    table = np.array(pairs, dtype=np.int64).reshape(-1, 3)
    return Wanted(places[:, 0], places[:, 1], table[:, 0], table[:, 1], table[:, 2])
