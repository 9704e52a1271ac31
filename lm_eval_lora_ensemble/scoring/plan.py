"""From the trie to work: which prefixes to compute once and keep, and which subtrees to run on them.

A *subtree* becomes one row (:mod:`..tree.rows`): a document's context and its choices, say. A token sees its ancestors
only, so each shared position is computed once. A *stem* is a prefix that more than one row needs: it is computed once
per member, its keys and values are kept, and its rows run on them. Stems nest: a prefix may extend another.

Cost of a row of L tokens on a prefix of P, in units of one token's attention to one other token::

    cost(L, P) = L · LINEAR + MASKED · L · (P + L)

``LINEAR`` is the linear layers' work for one token (for Llama-like shapes parameters per layer ÷ 2·d ≈ 3,000 to
30,000 of these units); ``MASKED`` is how much slower masked attention runs per operation than a matrix product.
Two sequences share a row when that is cheaper than computing their common prefix twice. Both constants only
steer the plan; no result depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from lm_eval_lora_ensemble.tree.trie import PrefixTrie

LINEAR = 3000
MASKED = 8
# A subtree larger than this many tokens does not fit one row; its shared prefix becomes a stem …
MAX_TREE_TOKENS = 512
# … unless the prefix is so short that computing it again in each row costs less than a forward pass for it.
MIN_STEM_TOKENS = 32


@dataclass(frozen=True)
class Subtree:
    """Sequences ``[start, stop)`` of the trie from position ``depth`` on, ``length`` distinct tokens: one row."""

    start: int
    stop: int
    depth: int
    length: int


@dataclass
class Stem:
    """A prefix whose keys and values are kept: positions ``[depth, end)`` of ``sequence``, and what runs on it.

    The root is the empty prefix.
    """

    sequence: int
    depth: int
    end: int
    subtrees: list[Subtree] = field(default_factory=list)
    children: list[Stem] = field(default_factory=list)


def make_plan(
    trie: PrefixTrie, *, max_tree_tokens: int = MAX_TREE_TOKENS, min_stem_tokens: int = MIN_STEM_TOKENS
) -> Stem:
    """Return the root of the plan; every sequence of the trie is in exactly one subtree of it."""
    root = Stem(sequence=0, depth=0, end=0)
    leaves: dict[int, list[int]] = {id(root): []}
    stems = [root]
    work = [(0, len(trie.sequences), root)] if trie.sequences else []
    while work:
        start, stop, stem = work.pop()
        inner = trie.shared[start + 1 : stop]
        prefix = int(inner.min()) if len(inner) else int(trie.lengths[start])
        if stop - start == 1 or trie.size(start, stop, stem.end) - (prefix - stem.end) <= max_tree_tokens:
            leaves[id(stem)].extend(range(start, stop))
            continue
        if prefix - stem.end >= min_stem_tokens:
            child = Stem(sequence=start, depth=stem.end, end=prefix)
            stem.children.append(child)
            stems.append(child)
            leaves[id(child)] = []
            stem = child
        cuts = [start, *(start + 1 + np.flatnonzero(inner == prefix)).tolist(), stop]
        work.extend((low, high, stem) for low, high in pairwise(cuts))
    for stem in stems:
        stem.subtrees = _subtrees(trie, sorted(leaves[id(stem)]), stem.end)
    return root


def _subtrees(trie: PrefixTrie, sequences: list[int], depth: int) -> list[Subtree]:
    """Join neighbouring sequences into one row where that costs less than computing their prefix twice."""
    subtrees: list[Subtree] = []
    for i in sequences:
        alone = int(trie.lengths[i]) - depth
        last = subtrees[-1] if subtrees else None
        if last and last.stop == i:
            joined = last.length + int(trie.lengths[i]) - max(int(trie.shared[i]), depth)
            if cost(joined, depth) <= cost(last.length, depth) + cost(alone, depth):
                subtrees[-1] = Subtree(last.start, i + 1, depth, joined)
                continue
        subtrees.append(Subtree(i, i + 1, depth, alone))
    return subtrees


def cost(length: int, prefix: int) -> int:
    """Return the cost of a row of ``length`` tokens on a kept prefix of ``prefix`` tokens (module docstring)."""
    return length * LINEAR + MASKED * length * (prefix + length)
