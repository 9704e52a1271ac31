"""Which documents each member sees at each step.

With length groups, the documents are sorted by length and cut into groups of a few batches. *When* a group is
visited is drawn once for the whole ensemble; *which* of its documents come together is drawn by each member.
All members of a step thus have rows of one length (the group's longest), alone or together: padding stays
low, and no member's arithmetic depends on its companions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_GROUPS = 16  # wanted; fewer where a group would have less than _LEAST_BATCHES
_LEAST_BATCHES, _MOST_BATCHES = 4, 32  # batches a group: enough to mix documents, few enough to be alike
_ROUND_TO = 8  # rows are padded to a multiple of this; matrix kernels like it
_VISITS, _DOCUMENTS = 1, 2  # independent random streams


@dataclass(frozen=True)
class MicroBatch:
    """One batch of one step: for each member its documents, and the length its rows are padded to."""

    documents: list[list[int]]
    length: int


class Order:
    """The order of the documents, a pure function of seeds and epoch: nothing to save, nothing to restore.

    Args:
        lengths: longest row of each document, in tokens.
        batch_size: documents a batch.
        accumulation: batches an optimiser step.
        seed: the ensemble's seed, which draws the order of the length groups.
        shuffle: False keeps the data set's order for every member.
        length_groups: False draws from the whole data set and pads to its longest row.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        accumulation: int = 1,
        *,
        seed: int = 0,
        shuffle: bool = True,
        length_groups: bool = True,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.shuffle = shuffle
        self.groups = self._groups(length_groups and shuffle)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps an epoch; the last may hold fewer documents."""
        batches = sum(-(-len(group) // self.batch_size) for group in self.groups)
        return -(-batches // self.accumulation)

    def epoch(self, epoch: int, member_seeds: Sequence[int]) -> list[list[MicroBatch]]:
        """Return the batches of every step of ``epoch`` for the members with the given seeds."""
        batches = [batch for group in self.groups for batch in self._batches(group, epoch, member_seeds)]
        if self.shuffle:
            visits = np.random.default_rng([self.seed, epoch, _VISITS]).permutation(len(batches))
            batches = [batches[i] for i in visits]
        return [batches[i : i + self.accumulation] for i in range(0, len(batches), self.accumulation)]

    def _groups(self, by_length: bool) -> list[np.ndarray]:
        if not by_length:
            return [np.arange(len(self.lengths))]
        batches = len(self.lengths) // self.batch_size // _GROUPS
        size = self.batch_size * min(max(batches, _LEAST_BATCHES), _MOST_BATCHES)
        by_size = np.argsort(self.lengths, kind="stable")
        return [by_size[i : i + size] for i in range(0, len(by_size), size)]

    def _batches(self, group: np.ndarray, epoch: int, member_seeds: Sequence[int]) -> list[MicroBatch]:
        """Cut a group into batches, in each member's own order."""
        orders = [self._member_order(group, epoch, seed) for seed in member_seeds]
        cuts = range(0, len(group), self.batch_size)
        documents = [[order[i : i + self.batch_size] for order in orders] for i in cuts]
        if self.shuffle:
            return [MicroBatch(each, round_up(int(self.lengths[group].max()))) for each in documents]
        return [MicroBatch(each, round_up(max(int(self.lengths[d]) for d in each[0]))) for each in documents]

    def _member_order(self, group: np.ndarray, epoch: int, seed: int) -> list[int]:
        if not self.shuffle:
            return [int(document) for document in group]
        generator = np.random.default_rng([seed, epoch, _DOCUMENTS, int(group[0])])
        return [int(document) for document in generator.permutation(group)]


def round_up(length: int) -> int:
    """Return the padded length of rows whose longest has ``length`` tokens."""
    return -(-length // _ROUND_TO) * _ROUND_TO
