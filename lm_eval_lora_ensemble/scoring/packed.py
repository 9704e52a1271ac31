"""The packed path: every distinct token position once per member, with the plain path's numbers.

Requests → trie → plan of stems and subtrees → batches under a token budget → members in turn inside each batch.
A request is done when its last target has a log-probability from every member, and is yielded at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lm_eval_lora_ensemble.scoring.forward import KeyValues, PackedModel, PackedRows
from lm_eval_lora_ensemble.scoring.greedy import MixtureArgmax
from lm_eval_lora_ensemble.scoring.loglikelihood import Score
from lm_eval_lora_ensemble.scoring.plan import Stem, Subtree, make_plan
from lm_eval_lora_ensemble.scoring.targets import BatchTargets, TargetSlots, collect_targets
from lm_eval_lora_ensemble.tree.requests import TokenRequest
from lm_eval_lora_ensemble.tree.rows import RowBatch, TreeRow, chain, lay_out
from lm_eval_lora_ensemble.tree.trie import PrefixTrie

logger = logging.getLogger(__name__)

# a row joins a pass if it fills this share of the longest row's length …
FULLNESS = 0.93
# … or while the pass is smaller than the token budget divided by this
SMALLEST_SHARE = 16


@dataclass
class Work:
    """What scoring some requests took.

    Attributes:
        n_positions: distinct token positions, the least any exact method computes per member.
        n_computed: token positions computed per member, prefixes computed again and padding included.
        n_head_rows: positions projected on the vocabulary, per member.
        n_attended: (query, key) pairs that attention computed per member and layer, masked ones included.
    """

    n_positions: int = 0
    n_computed: int = 0
    n_head_rows: int = 0
    n_attended: int = 0

    def count(self, batch: PackedRows, targets: BatchTargets) -> None:
        """Add one batch."""
        self.n_computed += batch.n_computed
        self.n_head_rows += len(targets.row)
        self.n_attended += batch.n_attended


@dataclass(frozen=True)
class _KeptPrefix:
    """Keys and values of a prefix: one set of the layers that members share, and each member's own."""

    end: int
    shared: KeyValues
    members: Sequence[KeyValues]


class PackedScorer:
    """Scores requests with a packed model.

    Args:
        model: runs tree rows as the active member.
        activate: makes a member active.
        n_members: number of members N.
        token_budget: token positions in one forward pass; halved when memory does not suffice.
        plan_options: arguments of :func:`.plan.make_plan` other than its defaults.
    """

    def __init__(
        self,
        model: PackedModel,
        activate: Callable[[int], None],
        *,
        n_members: int,
        token_budget: int,
        plan_options: Mapping[str, int] | None = None,
    ) -> None:
        self.model = model
        self.activate = activate
        self.n_members = n_members
        self.token_budget = token_budget
        self.plan_options = dict(plan_options or {})
        self.work = Work()

    def score(self, requests: Sequence[TokenRequest]) -> Iterator[tuple[int, Score]]:
        """Yield (index, score) of each request as soon as it is known."""
        return _ScoringCall(self, requests).run()

    def fitting(self, subtrees: Sequence[Subtree]) -> int:
        """Return how many of ``subtrees``, longest first, make one forward pass; at least one.

        Rows are padded to the longest, so much shorter ones wait for the next pass, unless this one would be
        too small to keep a matrix product busy.
        """
        longest = subtrees[0].length
        most = max(1, min(len(subtrees), self.token_budget // longest))
        enough = self.token_budget // SMALLEST_SHARE // longest
        count = 1
        while count < most and (count < enough or subtrees[count].length >= FULLNESS * longest):
            count += 1
        return count

    def halve_budget(self, subtrees: Sequence[Subtree]) -> None:
        """Take half as many tokens a pass as the one that ran out of memory."""
        self.token_budget = max(1, min(self.token_budget, len(subtrees) * subtrees[0].length) // 2)
        logger.warning("out of memory: continuing with at most %d tokens a forward pass", self.token_budget)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _ScoringCall:
    """One call of :meth:`PackedScorer.score`: its requests, and what is known of their targets so far.

    Arrays over slots (:class:`.targets.TargetSlots`) hold each member's log-probability of every target, and the
    member's own most likely token there, which settles nearly always whether the target is the mixture's.
    """

    def __init__(self, scorer: PackedScorer, requests: Sequence[TokenRequest]) -> None:
        self.scorer = scorer
        self.model = scorer.model
        self.requests = requests
        self.trie = PrefixTrie(requests)
        self.slots = TargetSlots(requests)
        shape = (scorer.n_members, len(self.slots))
        self.log_probs = np.zeros(shape, dtype=np.float32)
        self.top = np.zeros(shape, dtype=np.float32)
        self.top_token = np.zeros(shape, dtype=np.int32)
        # the members' hidden states [d] at targets inside stems, which later batches may need again
        self.stem_states: dict[int, list[torch.Tensor]] = {}

    def run(self) -> Iterator[tuple[int, Score]]:
        """Yield every request's index and score."""
        self.scorer.work.n_positions += self.trie.n_positions
        nothing = _KeptPrefix(0, {}, [{}] * self.scorer.n_members)
        yield from self._run_stem(make_plan(self.trie, **self.scorer.plan_options), nothing)

    def _run_stem(self, stem: Stem, prefix: _KeptPrefix) -> Iterator[tuple[int, Score]]:
        """Run everything on a stem: its own tokens, its subtrees in batches, then the stems that extend it."""
        if stem.end > stem.depth:
            own = self.trie.sequences[stem.sequence][stem.depth : stem.end]
            row = chain(own, stem.depth, self._sequences_through(stem))
            finished, states, prefix = self._run_batch([row], prefix, keep=True)
            self.stem_states.update(states)
            yield from self._scores(finished, states)
        waiting = sorted(stem.subtrees, key=lambda subtree: -subtree.length)
        while waiting:
            count = self.scorer.fitting(waiting)
            rows = [lay_out(self.trie, s.start, s.stop, s.depth) for s in waiting[:count]]
            try:
                finished, states, _ = self._run_batch(rows, prefix)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error) or count == 1:
                    raise
                self.scorer.halve_budget(waiting[:count])
                continue
            yield from self._scores(finished, states)
            waiting = waiting[count:]
        for child in stem.children:
            yield from self._run_stem(child, prefix)

    def _sequences_through(self, stem: Stem) -> list[int]:
        """Return the sequences with targets inside the stem: those that start with it and end in or near it."""
        trie, through, i = self.trie, [], stem.sequence
        while i < len(trie.sequences) and (i == stem.sequence or trie.shared[i] >= stem.end):
            targets = max(len(self.requests[index].targets) for index in trie.requests_of[i])
            if int(trie.lengths[i]) - targets < stem.end:
                through.append(i)
            i += 1
        return through

    def _run_batch(
        self, rows: Sequence[TreeRow], prefix: _KeptPrefix, *, keep: bool = False
    ) -> tuple[list[int], dict[int, list[torch.Tensor]], _KeptPrefix]:
        """Run one batch with every member.

        Returns:
            The requests that are complete now, the members' hidden states by slot, and with ``keep`` the prefix that
            the batch's one row makes longer.
        """
        batch = self.model.pack(RowBatch.pad(rows), prefix.end, chains=all(row.is_chain for row in rows))
        targets = collect_targets(self.trie, rows, prefix.end, self.requests, self.slots)
        shared, kept_shared = self.model.shared_hidden(batch, prefix.shared, keep=keep)
        states, kept = [], []
        for member in range(self.scorer.n_members):
            self.scorer.activate(member)
            hidden, key_values = self.model.hidden(batch, prefix.members[member], shared, keep=keep)
            states.append(self._read(member, hidden, targets))
            kept.append(key_values)
        self.scorer.work.count(batch, targets)
        by_slot = {
            slot: [of_member[at] for of_member in states]
            for slot, at in zip(targets.pair_slot.tolist(), targets.pair_position.tolist(), strict=True)
        }
        longer = _KeptPrefix(prefix.end + len(rows[0]), kept_shared, kept)
        return self.slots.finish(targets.pair_slot), by_slot, longer

    def _read(self, member: int, hidden: torch.Tensor, targets: BatchTargets) -> torch.Tensor:
        """Turn one member's hidden states [R, L, d] into the log-probabilities that are needed; return those states."""
        chosen = hidden[torch.from_numpy(targets.row), torch.from_numpy(targets.position)]
        known = self.model.log_probs_at(chosen, targets.pair_position, targets.pair_target)
        self.log_probs[member, targets.pair_slot] = known.of_targets
        self.top[member, targets.pair_slot] = known.top[targets.pair_position]
        self.top_token[member, targets.pair_slot] = known.top_token[targets.pair_position]
        return chosen

    def _scores(
        self, finished: Sequence[int], states: Mapping[int, list[torch.Tensor]]
    ) -> Iterator[tuple[int, Score]]:
        for index in finished:
            total = self.log_probs[:, self.slots.of(index)].sum(axis=1, dtype=np.float64)
            yield index, Score(total, self._is_greedy(index, states))

    def _is_greedy(self, index: int, states: Mapping[int, list[torch.Tensor]]) -> bool:
        """Whether each target is the mixture's argmax (:class:`.greedy.MixtureArgmax`).

        Two cheap facts settle nearly all requests: if every member's most likely token is the target, so is
        the mixture's; if one member's share of another token outweighs all members' shares of the target,
        the mixture's is not. Only what is left open needs distributions over the whole vocabulary.
        """
        slots = self.slots.of(index)
        log_probs = self.log_probs[:, slots].astype(np.float64)
        before = np.cumsum(log_probs, axis=1) - log_probs
        targets = np.array(self.requests[index].targets)
        agrees = self.top_token[:, slots] == targets
        if agrees.all():
            return True
        if not np.isfinite(log_probs).all():
            return False  # the caller refuses such a score
        rival = np.where(agrees, -np.inf, before + self.top[:, slots]).max(axis=0)
        if (rival > np.logaddexp.reduce(before + log_probs, axis=0)).any():
            return False
        for t in np.flatnonzero(~agrees.all(axis=0)).tolist():
            slot = slots.start + t
            mixture = MixtureArgmax()
            for member, state in enumerate(states[slot] if slot in states else self.stem_states[slot]):
                weight = torch.tensor([before[member, t]], dtype=torch.float32, device=state.device)
                mixture.add(self.model.log_probs(state[None]), weight)
            if not bool(mixture.matches(torch.tensor([targets[t]], device=state.device))):
                return False
        return True


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; the CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
