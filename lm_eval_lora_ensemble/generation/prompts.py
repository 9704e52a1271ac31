"""Prompts, read by the scoring engine: each distinct token once a member, its keys and values into the batch's caches.

Side by side and padded, as a decoder reads them otherwise, prompts cost their padding, their common beginnings once a
prompt, and a masked square of attention. As one flat stream they cost none of it, and members in turn keep a pass small
enough for a processor's cache. Decoding, a token a row, is what gains from members side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from lm_eval_lora_ensemble.scoring.forward import KeyValues, PackedModel, Stream, first_of
from lm_eval_lora_ensemble.scoring.passes import Pass, Passes
from lm_eval_lora_ensemble.tree.requests import TokenRequest
from lm_eval_lora_ensemble.tree.rows import IntArray, lay_out
from lm_eval_lora_ensemble.tree.trie import PrefixTrie


class PromptReader:
    """Reads prompts with a packed model.

    Args:
        model: runs a pass as the active member.
        activate: makes a member active.
        n_members: number of members N.
        token_budget: token positions in one forward pass.
    """

    def __init__(
        self, model: PackedModel, activate: Callable[[int], None], *, n_members: int, token_budget: int
    ) -> None:
        self._model = model
        self._activate = activate
        self._n_members = n_members
        self._budget = token_budget
        # kept from one call to the next, which mostly begins alike
        self._beginning: tuple[int, ...] = ()
        self._of_beginning: list[KeyValues] = []

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], shared: int) -> tuple[torch.Tensor, list[KeyValues]]:
        """Read B prompts.

        Args:
            prompts: token ids, at least one each.
            shared: so many tokens that all begin with, fewer than any has, are kept for the next call.

        Returns:
            Next-token log-probabilities [N, B, V], float32, and each member's keys and values, by layer
            [B, heads, L, d] with L the longest prompt's length; in front of a shorter prompt stand any other's.
        """
        beginning = tuple(prompts[0][:shared])
        reading = _Reading([*map(tuple, prompts), *([beginning] if shared else [])], len(prompts))
        kept: list[KeyValues] = [{}] * self._n_members
        start = 0
        if shared:
            # what all begin with is the first of the sorted sequences
            if beginning != self._beginning:
                self._beginning, self._of_beginning = (), []
                self._of_beginning = self._run(reading, Pass(0, 1, 0), kept)
                self._beginning = beginning
            kept, start = self._of_beginning, 1
        while start < len(reading.trie.sequences):
            one = reading.passes.take(start, self._budget)
            kept = self._run(reading, one, kept)
            start = one.stop
        return torch.stack(reading.log_probs), reading.key_values

    def _run(self, reading: _Reading, one: Pass, before: Sequence[KeyValues]) -> list[KeyValues]:
        """Run one pass with every member; return the next pass's prefix."""
        model = self._model
        row = lay_out(reading.trie, one.start, one.stop)
        stream = Stream(row, one.prefix, np.arange(len(row)), model.device)
        path = torch.from_numpy(row.paths[one.stop - 1][: reading.passes.shared_with_next(one.stop)])
        rows, places = (x.to(model.device) for x in reading.rows(one, row.paths))
        last = places[:, -1] - one.prefix
        prefixes = [first_of(kept, one.prefix) for kept in before]
        shared, of_all = model.shared_hidden(stream, prefixes[0])
        after = []
        for member in range(self._n_members):
            self._activate(member)
            hidden, own = model.hidden(stream, prefixes[member], shared)
            whole = {**of_all, **own}
            if len(rows):
                log_probs = model.head.log_probs(hidden[last.to(hidden.device)])
                reading.note(member, rows, places, log_probs, whole)
            after.append(_at(whole, path))
        return after


class _Reading:
    """What is known of the prompts of one call.

    Args:
        texts: the prompts, and what they begin with if it is to be kept.
        count: number of prompts B.
    """

    def __init__(self, texts: Sequence[tuple[int, ...]], count: int) -> None:
        requests = [TokenRequest(text, (0,)) for text in texts]  # its next token is asked for, whichever
        self.trie = PrefixTrie(requests)
        self.passes = Passes(self.trie, requests)
        self.log_probs: list[torch.Tensor] = []
        self.key_values: list[KeyValues] = []
        self._count = count
        self._longest = max(map(len, texts))

    def rows(self, one: Pass, paths: Mapping[int, IntArray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prompts of a pass, and the places of their tokens [prompts, L], the last ones in column L − 1."""
        rows, places = [], []
        for sequence in range(one.start, one.stop):
            padded = np.zeros(self._longest, dtype=np.int64)
            padded[self._longest - len(paths[sequence]) :] = paths[sequence]
            for prompt in self.trie.requests_of[sequence]:
                if prompt < self._count:
                    rows.append(prompt)
                    places.append(padded)
        of_prompts = np.array(places, dtype=np.int64).reshape(-1, self._longest)
        return torch.tensor(rows, dtype=torch.long), torch.from_numpy(of_prompts)

    def note(
        self,
        member: int,
        rows: torch.Tensor,
        places: torch.Tensor,
        log_probs: torch.Tensor,
        of_pass: KeyValues,
    ) -> None:
        """Write what a member knows of some prompts into their rows."""
        if len(self.log_probs) == member:
            self.log_probs.append(log_probs.new_empty(self._count, log_probs.shape[1]))
            self.key_values.append({})
        self.log_probs[member][rows.to(log_probs.device)] = log_probs
        of_member = self.key_values[member]
        for layer, states in of_pass.items():
            if layer not in of_member:
                keys, values = (
                    x.new_empty(self._count, x.shape[1], self._longest, x.shape[3]) for x in states
                )
                of_member[layer] = keys, values
            for whole, new in zip(of_member[layer], states, strict=True):
                whole[rows.to(new.device)] = new[0][:, places.to(new.device)].transpose(0, 1)


def _at(kept: KeyValues, places: torch.Tensor) -> KeyValues:
    """Return the keys and values of some places; nothing for none."""
    if not len(places):
        return {}
    return {
        layer: (
            keys.index_select(2, places.to(keys.device)),
            values.index_select(2, places.to(values.device)),
        )
        for layer, (keys, values) in kept.items()
    }
