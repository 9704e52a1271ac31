"""The packed path: every distinct token position once per member, with the plain path's numbers.

Requests → trie → passes under a token budget (:mod:`.passes`) → members in turn inside each pass. A pass is whole: the
requests that it holds are answered when its last member is done, and yielded at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lm_eval_lora_ensemble.scoring.forward import KeyValues, PackedModel, Stream, first_of
from lm_eval_lora_ensemble.scoring.greedy import MixtureArgmax, settle
from lm_eval_lora_ensemble.scoring.head import blocks
from lm_eval_lora_ensemble.scoring.loglikelihood import Score
from lm_eval_lora_ensemble.scoring.passes import Pass, Passes
from lm_eval_lora_ensemble.scoring.targets import PassTargets, collect_targets
from lm_eval_lora_ensemble.tree.requests import TokenRequest
from lm_eval_lora_ensemble.tree.rows import lay_out
from lm_eval_lora_ensemble.tree.trie import PrefixTrie

logger = logging.getLogger(__name__)


@dataclass
class Work:
    """What scoring some requests took.

    Attributes:
        n_positions: distinct token positions, the least any exact method computes per member.
        n_computed: token positions computed per member, those computed again included.
        n_head_rows: positions projected on the vocabulary, per member; those of the greedy check included.
        n_attended: (query, key) pairs that attention computed per member and layer, masked ones included.
        n_passes: forward passes per member.
    """

    n_positions: int = 0
    n_computed: int = 0
    n_head_rows: int = 0
    n_attended: int = 0
    n_passes: int = 0


@dataclass(frozen=True)
class _Kept:
    """Keys and values of a path that the next pass begins with: of the layers that members share, and each member's."""

    shared: KeyValues
    members: Sequence[KeyValues]

    def first(self, length: int) -> _Kept:
        """Return those of the path's first ``length`` tokens."""
        return _Kept(first_of(self.shared, length), [first_of(member, length) for member in self.members])


class PackedScorer:
    """Scores requests with a packed model.

    Args:
        model: runs a pass as the active member.
        activate: makes a member active.
        n_members: number of members N.
        token_budget: token positions in one forward pass; halved when memory does not suffice.
    """

    def __init__(
        self, model: PackedModel, activate: Callable[[int], None], *, n_members: int, token_budget: int
    ) -> None:
        self.model = model
        self.activate = activate
        self.n_members = n_members
        self.token_budget = token_budget
        self.work = Work()

    def score(self, requests: Sequence[TokenRequest]) -> Iterator[tuple[int, Score]]:
        """Yield (index, score) of each request as soon as its pass is done."""
        trie = PrefixTrie(requests)
        self.work.n_positions += trie.n_positions
        passes = Passes(trie, requests)
        kept = _Kept({}, [{}] * self.n_members)
        start = 0
        while start < len(trie.sequences):
            one = passes.take(start, self.token_budget)
            try:
                known, kept = self._run(trie, passes, requests, one, kept)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error) or one.stop - one.start == 1:
                    raise
                self._halve_budget(passes.size(one))
                continue
            yield from known
            start = one.stop

    def _run(
        self, trie: PrefixTrie, passes: Passes, requests: Sequence[TokenRequest], one: Pass, kept: _Kept
    ) -> tuple[list[tuple[int, Score]], _Kept]:
        """Run one pass with every member."""
        row = lay_out(trie, one.start, one.stop)
        path = row.paths[one.stop - 1][: passes.shared_with_next(one.stop)]
        stream = Stream(row, one.prefix, path, self.model.device)
        targets = collect_targets(trie, row, requests)
        places = torch.from_numpy(targets.place - one.prefix)
        before = kept.first(one.prefix)
        answers = _Answers(self, targets)
        shared, kept_shared = self.model.shared_hidden(stream, before.shared)
        kept_members = []
        for member in range(self.n_members):
            self.activate(member)
            hidden, of_member = self.model.hidden(stream, before.members[member], shared)
            answers.add(member, hidden[places.to(hidden.device)])
            kept_members.append(of_member)
        self.work.n_computed += passes.size(one)
        self.work.n_attended += self.model.n_attended(stream)
        self.work.n_passes += 1
        return list(answers.scores()), _Kept(kept_shared, kept_members)

    def _halve_budget(self, tokens: int) -> None:
        """Take half as many tokens a pass as the one that ran out of memory."""
        self.token_budget = max(1, min(self.token_budget, tokens) // 2)
        logger.warning("out of memory: continuing with at most %d tokens a forward pass", self.token_budget)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Answers:
    """What the members say of one pass's targets.

    Args:
        scorer: whose members they are.
        targets: K of them, at R distinct positions.
    """

    def __init__(self, scorer: PackedScorer, targets: PassTargets) -> None:
        self.scorer = scorer
        self.targets = targets
        shape = (scorer.n_members, len(targets.target))
        self.log_probs = np.empty(shape, dtype=np.float32)
        self.top = np.empty(shape, dtype=np.float32)
        self.top_token = np.empty(shape, dtype=np.int64)
        self.states: list[torch.Tensor] = []

    def add(self, member: int, states: torch.Tensor) -> None:
        """Read the active member's hidden states [R, d] at the positions."""
        targets = self.targets
        known = self.scorer.model.head.read(states, targets.position, targets.target)
        self.scorer.work.n_head_rows += len(states) if member == 0 else 0
        self.log_probs[member] = known.of_targets
        self.top[member] = known.top[targets.position]
        self.top_token[member] = known.top_token[targets.position]
        self.states.append(states)

    def scores(self) -> Iterator[tuple[int, Score]]:
        """Yield the score of each request, all members having been added."""
        first = self.targets.first
        exact = self.log_probs.astype(np.float64)
        # of the continuation before each target
        before = np.concatenate(
            [np.cumsum(part, axis=1) - part for part in np.split(exact, first[1:-1], axis=1)], axis=1
        )
        finite = np.isfinite(exact).all(axis=0)
        settled = np.zeros(exact.shape[1], dtype=np.int8)
        settled[finite] = settle(
            self.log_probs[:, finite],
            self.top[:, finite],
            self.top_token[:, finite],
            self.targets.target[finite],
            before[:, finite],
        )
        self._settle_by_vocabulary(settled, before)
        for i, index in enumerate(self.targets.requests.tolist()):
            mine = slice(first[i], first[i + 1])
            yield index, Score(exact[:, mine].sum(axis=1), bool((settled[mine] == 1).all()))

    def _settle_by_vocabulary(self, settled: npt.NDArray[np.int8], before: npt.NDArray[np.float64]) -> None:
        """Decide what bounds left open, for requests that have no settled no, from whole distributions."""
        refuted = np.zeros(len(self.targets.requests), dtype=bool)
        np.logical_or.at(refuted, self.targets.owner, settled == 0)
        undecided = np.flatnonzero((settled == -1) & ~refuted[self.targets.owner])
        for start, stop in blocks(len(undecided), self.scorer.model.head.positions_at_once):
            some = undecided[start:stop]
            mixture = MixtureArgmax()
            for member, states in enumerate(self.states):
                self.scorer.activate(member)
                rows = states[torch.from_numpy(self.targets.position[some]).to(states.device)]
                weights = torch.from_numpy(before[member, some]).to(rows.device, torch.float32)
                mixture.add(self.scorer.model.head.log_probs(rows), weights)
            target = torch.from_numpy(self.targets.target[some]).to(rows.device)
            settled[some] = mixture.matches(target).cpu().numpy()
            self.scorer.work.n_head_rows += len(some)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; the CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
