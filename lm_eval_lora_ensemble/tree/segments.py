"""Segments: the attention of a tree row, cut into pieces that need no mask or a small one.

One mask over a whole row is a square most of which is empty: above the diagonal of a few-shot context, between the
documents of a pass. Depth-first order makes the full parts rectangles. A *chain* is a run of tokens without a branch,
and its descendants are the interval behind it, so ::

    a chain's own tokens      causal among themselves
    all its descendants       see all of it: one rectangle, no mask
    a small subtree           one small square under the interval mask

Every query has exactly one piece with its own key in it, :attr:`Plan.own`, and any number of rectangles over ancestors,
:attr:`Plan.above`; the parts are joined by their log-sum-exp. A short chain over small subtrees is *carried* instead:
its keys are copied in front of each square, which is cheaper than joining a part for all of its descendants.

A sliding window sees a key if ``position[q] - position[k] < window``. It turns a rectangle into nothing, into itself or
into a masked one, by the positions at its borders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from lm_eval_lora_ensemble.tree.rows import IntArray, TreeRow

Kind = Literal["causal", "full", "masked"]


class Sizes(NamedTuple):
    """How large the pieces are. No score depends on it.

    Attributes:
        square: subtrees are joined in one masked square up to so many tokens.
        whole: a subtree up to so many tokens is not cut.
        block: a longer chain is cut into causal blocks of so many tokens.
        carried: a chain up to so many tokens is copied in front of the squares below it.
    """

    square: int = 64
    whole: int = 128
    block: int = 256
    carried: int = 64


DEFAULT_SIZES = Sizes()


@dataclass(frozen=True)
class Piece:
    """Attention of some queries to some keys, all of them or as the mask says.

    Attributes:
        first, last: the queries, places ``[first, last)`` of the row.
        keys: places of the keys, as half-open intervals in ascending order; more than one where some are carried.
        kind: ``causal`` (the keys are the queries), ``full``, or ``masked`` by interval and window.
    """

    first: int
    last: int
    keys: tuple[tuple[int, int], ...]
    kind: Kind

    @property
    def n_keys(self) -> int:
        """Number of keys."""
        return sum(last - first for first, last in self.keys)

    @property
    def n_pairs(self) -> int:
        """(query, key) pairs that are computed; those of a causal piece once."""
        n = self.last - self.first
        return n * (n + 1) // 2 if self.kind == "causal" else n * self.n_keys

    @property
    def places(self) -> IntArray:
        """The keys' places."""
        return np.concatenate([np.arange(first, last) for first, last in self.keys])


@dataclass(frozen=True)
class Plan:
    """All attention of the places ``[prefix, len(row))`` of a row.

    Attributes:
        own: in order of their queries, which together are every computed place once; each query's own key is among
            its piece's.
        above: rectangles over keys before those.
    """

    own: tuple[Piece, ...]
    above: tuple[Piece, ...]

    @property
    def n_pairs(self) -> int:
        """(query, key) pairs of one layer."""
        return sum(piece.n_pairs for piece in (*self.own, *self.above))


def plan_segments(
    row: TreeRow, prefix: int = 0, window: int | None = None, sizes: Sizes = DEFAULT_SIZES
) -> Plan:
    """Cut the attention of a row's places from ``prefix`` on.

    Args:
        row: whose first ``prefix`` places are a chain that was computed before; they are keys only.
        prefix: how many.
        window: of a layer with sliding attention, in positions.
        sizes: of the pieces.

    Example:
        >>> from lm_eval_lora_ensemble.tree.rows import chain
        >>> plan = plan_segments(chain(range(6)), sizes=Sizes(square=2, whole=2, block=4))
        >>> [(piece.first, piece.last, piece.keys, piece.kind) for piece in plan.own]
        [(0, 4, ((0, 4),), 'causal'), (4, 6, ((4, 6),), 'causal')]
        >>> [(piece.first, piece.last, piece.keys, piece.kind) for piece in plan.above]
        [(4, 6, ((0, 4),), 'full')]
    """
    cutter = _Cutter(row.end, prefix, sizes)
    cutter.forest(0, len(row), ())
    own, above = cutter.own, cutter.above
    if window is not None and int(row.positions.max(initial=0)) >= window:
        own = [_in_window(piece, row.positions, window) for piece in own]
        above = [kept for piece in above for kept in _visible(piece, row.positions, window)]
    return Plan(tuple(own), tuple(above))


class _Cutter:
    """One walk over the trees of a row."""

    def __init__(self, end: IntArray, prefix: int, sizes: Sizes) -> None:
        self.end = end
        self.prefix = prefix
        self.sizes = sizes
        # the last place of the chain that each place is in: where the next place has another end, a branch begins or a
        # leaf stops
        breaks = np.flatnonzero(np.diff(end, append=-1) != 0)
        self.chain_last = breaks[np.searchsorted(breaks, np.arange(len(end)))] + 1
        self.own: list[Piece] = []
        self.above: list[Piece] = []

    def forest(self, first: int, last: int, carried: tuple[tuple[int, int], ...]) -> None:
        """Cut the subtrees that fill ``[first, last)``; their ancestors are the ``carried`` or dealt with."""
        start = first
        while start < last:
            stop = int(self.end[start])
            if stop - start > self.sizes.whole:
                self._large(start, stop, carried)
            else:
                while stop < last and int(self.end[stop]) - start <= self.sizes.square:
                    stop = int(self.end[stop])
                self._small(start, stop, carried)
            start = stop

    def _small(self, first: int, last: int, carried: tuple[tuple[int, int], ...]) -> None:
        if last <= self.prefix:
            return
        begin = max(first, self.prefix)
        if self.chain_last[first] == last and begin == first and not carried:
            self.own.append(Piece(first, last, ((first, last),), "causal"))
        else:
            self.own.append(Piece(begin, last, (*carried, (first, last)), "masked"))

    def _large(self, first: int, last: int, carried: tuple[tuple[int, int], ...]) -> None:
        """Cut one subtree: its chain, and what hangs on it."""
        chain = int(self.chain_last[first])
        below = max(chain, self.prefix)
        # what is carried is in no rectangle, so it has to be in front of the chain's own blocks too
        for begin in range(first, chain, self.sizes.block):
            self._block(first, begin, min(begin + self.sizes.block, chain), carried)
        if below >= last:
            return
        if chain - first + sum(b - a for a, b in carried) <= self.sizes.carried:
            self.forest(chain, last, (*carried, (first, chain)))
            return
        for keys in (*carried, (first, chain)):
            self.above.append(Piece(below, last, (keys,), "full"))
        self.forest(chain, last, ())

    def _block(self, chain: int, first: int, last: int, carried: tuple[tuple[int, int], ...]) -> None:
        """Cut one block ``[first, last)`` of a chain that begins at ``chain``."""
        begin = max(first, self.prefix)
        if begin >= last:
            return
        self.own.append(Piece(begin, last, ((begin, last),), "causal"))
        for keys in (*carried, (chain, begin)):
            if keys[0] < keys[1]:
                self.above.append(Piece(begin, last, (keys,), "full"))


def _in_window(piece: Piece, positions: IntArray, window: int) -> Piece:
    """Mask an own piece whose queries reach further back than the window."""
    keys = min(int(positions[first:last].min()) for first, last in piece.keys)
    near = int(positions[piece.first : piece.last].max()) - keys < window
    return piece if near or piece.kind == "masked" else replace(piece, kind="masked")


def _visible(piece: Piece, positions: IntArray, window: int) -> Iterator[Piece]:
    """Yield the part of a rectangle that a window leaves: the keys that some query sees."""
    (first, last) = piece.keys[0]
    queries = positions[piece.first : piece.last]
    # a rectangle's keys are part of a chain: their positions ascend by one
    seen = int(queries.min()) - window + 1 - int(positions[first])
    first = min(max(first + seen, first), last)
    if first < last:
        all_seen = int(queries.max()) - int(positions[first]) < window
        yield replace(piece, keys=((first, last),), kind="full" if all_seen else "masked")
