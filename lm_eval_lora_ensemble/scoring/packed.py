"""The packed path: every distinct token position once per member, with the plain path's numbers.

Requests → trie → plan of stems and rows → batches under a token budget → members in turn inside each batch.
A request is done when its last target has a log-probability from every member, and is yielded at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lm_eval_lora_ensemble.scoring.forward import KeyValues, PackedModel
from lm_eval_lora_ensemble.scoring.greedy import MixtureArgmax
from lm_eval_lora_ensemble.scoring.plan import Row, Stem, make_plan
from lm_eval_lora_ensemble.tree.requests import Score, TokenRequest
from lm_eval_lora_ensemble.tree.rows import PackedInput, TreeRow, Wanted, lay_out, pack, wanted
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


@dataclass
class _Hidden:
    """Hidden states of a batch's wanted positions under each member, for the few that need them again."""

    of_slot: dict[int, int] = field(default_factory=dict)
    states: list[torch.Tensor] = field(default_factory=list)


class PackedScorer:
    """Scores requests with a packed model.

    Args:
        model: runs packed rows as the active member.
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
        plan_options: dict[str, int] | None = None,
    ) -> None:
        self.model = model
        self.activate = activate
        self.n_members = n_members
        self.token_budget = token_budget
        self.plan_options = plan_options or {}
        self.work = Work()

    def score(self, requests: Sequence[TokenRequest]) -> Iterator[tuple[int, Score]]:
        """Yield (index, score) of each request as soon as it is known."""
        self._requests = requests
        self._trie = PrefixTrie(requests)
        sizes = np.array([len(request.targets) for request in requests], dtype=np.int64)
        self._first_slot = np.concatenate([[0], np.cumsum(sizes)])
        n_slots = int(self._first_slot[-1])
        self._owner = np.repeat(np.arange(len(requests)), sizes)
        self._missing = sizes.copy()
        self._done = np.zeros(n_slots, dtype=bool)
        self._log_probs = np.zeros((self.n_members, n_slots), dtype=np.float32)
        self._top = np.zeros((self.n_members, n_slots), dtype=np.float32)
        self._top_token = np.zeros((self.n_members, n_slots), dtype=np.int32)
        self._stem_hidden: dict[int, list[torch.Tensor]] = {}
        self.work.n_positions += self._trie.n_positions
        yield from self._run_stem(make_plan(self._trie, **self.plan_options), self._no_prefix(), {})

    def _no_prefix(self) -> list[KeyValues]:
        return [{} for _ in range(self.n_members)]

    def _run_stem(
        self, stem: Stem, prefix: list[KeyValues], shared_prefix: KeyValues
    ) -> Iterator[tuple[int, Score]]:
        """Run everything on a stem: its own tokens, its rows in batches, then the stems that extend it."""
        if stem.end > stem.depth:
            finished, prefix, shared_prefix = self._run_stem_tokens(stem, prefix, shared_prefix)
            yield from finished
        waiting = sorted(stem.rows, key=lambda row: -row.length)
        while waiting:
            count = self._fitting(waiting)
            try:
                finished = self._run_rows(waiting[:count], stem.end, prefix, shared_prefix)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error) or count == 1:
                    raise
                self._halve_budget(waiting[:count])
                continue
            yield from finished
            waiting = waiting[count:]
        for child in stem.children:
            yield from self._run_stem(child, prefix, shared_prefix)

    def _fitting(self, rows: Sequence[Row]) -> int:
        """Return how many of ``rows``, longest first, make one forward pass; at least one.

        Rows are padded to the longest, so much shorter ones wait for the next pass, unless this one would be
        too small to keep a matrix product busy.
        """
        longest = rows[0].length
        most = max(1, min(len(rows), self.token_budget // longest))
        enough = self.token_budget // SMALLEST_SHARE // longest
        count = 1
        while count < most and (count < enough or rows[count].length >= FULLNESS * longest):
            count += 1
        return count

    def _halve_budget(self, rows: Sequence[Row]) -> None:
        self.token_budget = max(1, min(self.token_budget, len(rows) * rows[0].length) // 2)
        logger.warning("out of memory: continuing with at most %d tokens a forward pass", self.token_budget)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run_stem_tokens(
        self, stem: Stem, prefix: list[KeyValues], shared_prefix: KeyValues
    ) -> tuple[list[tuple[int, Score]], list[KeyValues], KeyValues]:
        """Compute a stem's own positions for every member and keep their keys and values."""
        tokens = self._trie.sequences[stem.sequence][stem.depth : stem.end]
        positions = np.arange(len(tokens))
        through = dict.fromkeys(self._sequences_through(stem), positions)
        chain = TreeRow(np.array(tokens), stem.depth + positions, None, through)
        batch = pack([chain], stem.depth, self.model.dtype, self.model.device)
        want = self._wanted([chain], stem.depth)
        shared, kept_shared = self.model.shared_hidden(batch, shared_prefix, keep=True)
        kept = []
        hidden = _Hidden(dict(zip(want.pair_slot.tolist(), want.pair_position.tolist(), strict=True)))
        for member in range(self.n_members):
            self.activate(member)
            states, key_values = self.model.hidden(batch, prefix[member], shared, keep=True)
            self._read(member, states, want, hidden)
            kept.append(key_values)
        self._count(batch, stem.depth, want)
        for slot, at in hidden.of_slot.items():
            self._stem_hidden[slot] = [states[at] for states in hidden.states]
        return self._finish(want, _Hidden()), kept, kept_shared

    def _sequences_through(self, stem: Stem) -> list[int]:
        """Return the sequences with targets inside the stem: those that start with it and end in or near it."""
        trie, found, i = self._trie, [], stem.sequence
        while i < len(trie.sequences) and (i == stem.sequence or trie.shared[i] >= stem.end):
            targets = max(len(self._requests[index].targets) for index in trie.requests_of[i])
            if int(trie.lengths[i]) - targets < stem.end:
                found.append(i)
            i += 1
        return found

    def _run_rows(
        self, rows: Sequence[Row], depth: int, prefix: list[KeyValues], shared_prefix: KeyValues
    ) -> list[tuple[int, Score]]:
        """Run one batch with every member."""
        laid_out = [lay_out(self._trie, row) for row in rows]
        batch = pack(laid_out, depth, self.model.dtype, self.model.device)
        want = self._wanted(laid_out, depth)
        shared, _ = self.model.shared_hidden(batch, shared_prefix)
        hidden = _Hidden(dict(zip(want.pair_slot.tolist(), want.pair_position.tolist(), strict=True)))
        for member in range(self.n_members):
            self.activate(member)
            states, _ = self.model.hidden(batch, prefix[member], shared)
            self._read(member, states, want, hidden)
        self._count(batch, depth, want)
        return self._finish(want, hidden)

    def _wanted(self, rows: Sequence[TreeRow], depth: int) -> Wanted:
        return wanted(self._trie, rows, depth, self._requests, self._first_slot, self._done)

    def _read(self, member: int, states: torch.Tensor, want: Wanted, hidden: _Hidden) -> None:
        """Turn one member's hidden states [B, L, d] into the log-probabilities that are wanted."""
        chosen = states[torch.from_numpy(want.row), torch.from_numpy(want.position)]
        found = self.model.row_log_probs(chosen, want.pair_position, want.pair_target)
        self._log_probs[member, want.pair_slot] = found.of_targets
        self._top[member, want.pair_slot] = found.top[want.pair_position]
        self._top_token[member, want.pair_slot] = found.top_token[want.pair_position]
        hidden.states.append(chosen)

    def _count(self, batch: PackedInput, depth: int, want: Wanted) -> None:
        rows, length = batch.input_ids.shape
        self.work.n_computed += batch.n_computed
        self.work.n_head_rows += len(want.row)
        self.work.n_attended += rows * length * (depth + length)

    def _finish(self, want: Wanted, hidden: _Hidden) -> list[tuple[int, Score]]:
        """Score the requests for which nothing is missing any more."""
        self._done[want.pair_slot] = True
        owners, counts = np.unique(self._owner[want.pair_slot], return_counts=True)
        self._missing[owners] -= counts
        finished = []
        for index in owners[self._missing[owners] == 0].tolist():
            slots = slice(int(self._first_slot[index]), int(self._first_slot[index + 1]))
            total = self._log_probs[:, slots].sum(axis=1, dtype=np.float64)
            finished.append((index, Score(total, self._is_greedy(index, slots, hidden))))
        return finished

    def _is_greedy(self, index: int, slots: slice, hidden: _Hidden) -> bool:
        """Whether each target is the mixture's argmax (:class:`.greedy.MixtureArgmax`).

        Two cheap facts settle nearly all requests: if every member's most likely token is the target, so is
        the mixture's; if one member's share of another token outweighs all members' shares of the target,
        the mixture's is not. Only what is left open needs distributions over the whole vocabulary.
        """
        log_probs = self._log_probs[:, slots].astype(np.float64)
        before = np.cumsum(log_probs, axis=1) - log_probs
        targets = np.array(self._requests[index].targets)
        agrees = self._top_token[:, slots] == targets
        if agrees.all():
            return True
        rival = np.where(agrees, -np.inf, before + self._top[:, slots]).max(axis=0)
        if (rival > np.logaddexp.reduce(before + log_probs, axis=0)).any():
            return False
        for t in np.flatnonzero(~agrees.all(axis=0)).tolist():
            mixture = MixtureArgmax()
            for member, state in enumerate(self._states(slots.start + t, hidden)):
                weight = torch.tensor([before[member, t]], dtype=torch.float32, device=state.device)
                mixture.add(self.model.log_probs(state[None]), weight)
            if not bool(mixture.matches(torch.tensor([targets[t]], device=state.device))):
                return False
        return True

    def _states(self, slot: int, hidden: _Hidden) -> list[torch.Tensor]:
        """Return the members' hidden states [d] at the position of a target."""
        if slot in hidden.of_slot:
            return [states[hidden.of_slot[slot]] for states in hidden.states]
        return self._stem_hidden[slot]


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; the CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
