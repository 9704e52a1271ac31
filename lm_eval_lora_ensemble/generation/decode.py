"""Decoding from the mixture: every member reads the same text, and one next token is chosen for all of them.

Rows are member-major, [N · B]. Members that can run side by side do (:mod:`.stacked`); others run in turn, each on a
cache of its own, and nothing else differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lm_eval_lora_ensemble.generation.answer import Ended, Trace
from lm_eval_lora_ensemble.generation.cache import keep_rows, new_cache
from lm_eval_lora_ensemble.generation.measures import effective_members, token_measures
from lm_eval_lora_ensemble.generation.mixture import GenerationAverage, log_mixture, log_weights
from lm_eval_lora_ensemble.generation.prompts import PromptReader
from lm_eval_lora_ensemble.generation.settings import NextToken
from lm_eval_lora_ensemble.precision import widest_float

Enter = Callable[[], AbstractContextManager[Any]]
"""Makes the model answer as some members, for as long as the context is entered."""


class Side(NamedTuple):
    """Members that one forward pass holds.

    Attributes:
        members: how many.
        prepare: does once for a batch of texts what need not be done for every token of them.
    """

    members: int
    prepare: Callable[[], Enter]


class _Pass(NamedTuple):
    """A side at work on a batch of texts, with what its members remember of them."""

    members: int
    enter: Enter
    cache: Any


class Prompt(NamedTuple):
    """A text to go on with.

    Attributes:
        tokens: its ids.
        max_new_tokens: at most so many more.
        draws: gives a number in [0, 1) for every token that is drawn; the prompt's own, whoever is beside it.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    draws: Callable[[], float]


Stops = Callable[[Sequence[int]], bool]


class NonFiniteLogitsError(Exception):
    """A member's next-token distribution is not one.

    Attributes:
        member: its number.
        prompt: the number of the prompt in the batch.
    """

    def __init__(self, member: int, prompt: int) -> None:
        super().__init__(f"member {member}, prompt {prompt}")
        self.member, self.prompt = member, prompt


@dataclass
class _Row:
    """A prompt on its way: what was seen of each token generated so far."""

    index: int
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    seen: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def trace(self, ended: Ended) -> Trace:
        seen = np.array(self.seen).T
        return Trace(np.array(self.tokens), seen[0], seen[1], seen[2], seen[3], seen[4:], ended)


class Decoder:
    """Generates texts from N members on one base model.

    Args:
        model: ``…ForCausalLM``, wrapped by PEFT or not.
        sides: which members each forward pass holds; together all of them, in order.
        average: how members are weighted, see :mod:`.mixture`.
        pad_token: any token id.
        end_tokens: ids that end a text.
        reader: reads the prompts, each distinct token once; without it they are read padded, side by side.
    """

    def __init__(
        self,
        model: Any,
        sides: Sequence[Side],
        *,
        average: GenerationAverage = "posterior",
        pad_token: int = 0,
        end_tokens: Sequence[int] = (),
        reader: PromptReader | None = None,
    ) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._model = causal
        self._sides = sides
        self._average = average
        self._pad = pad_token
        self.end_tokens = frozenset(end_tokens)
        self._device = causal.get_input_embeddings().weight.device
        taken = inspect.signature(causal.forward).parameters
        # transformers 5.24 renames the argument; 5.40 drops the old name
        self._cache_argument = "cache" if "cache" in taken else "past_key_values"
        self._takes_positions = "position_ids" in taken
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._reader = reader

    def decode(
        self, prompts: Sequence[Prompt], shared: int, choose: NextToken, stops: Stops
    ) -> Iterator[tuple[int, Trace]]:
        """Generate a text for each prompt; yield (index, trace) as texts end.

        Args:
            prompts: B prompts of at least one token.
            shared: so many tokens that all begin with are computed once for all calls, by a reader.
            choose: chooses the tokens.
            stops: whether what was generated ends here.

        Raises:
            NonFiniteLogitsError: a member's logits are NaN or infinite.
        """
        rows = [_Row(i, prompt) for i, prompt in enumerate(prompts)]
        longest = max(len(prompt.tokens) for prompt in prompts)
        room = longest + max(prompt.max_new_tokens for prompt in prompts)
        passes = [
            _Pass(side.members, side.prepare(), new_cache(self._model.config, room)) for side in self._sides
        ]
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            mask[i, longest - len(prompt.tokens) :] = 1
        mask = mask.to(self._device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        log_probs = self._read(passes, prompts, shared, mask, positions)
        scores = torch.zeros(len(log_probs), len(rows), dtype=widest_float(self._device), device=self._device)
        while True:
            weights = log_weights(scores, self._average)
            mixture = log_mixture(log_probs, weights)
            self._refuse_nonfinite(log_probs, mixture, rows)
            chosen = choose.choose(
                mixture,
                [[*row.prompt.tokens, *row.tokens] for row in rows],
                len(rows[0].tokens),
                [row.prompt.draws() for row in rows],
            )
            at = chosen[None, :, None].expand(len(log_probs), -1, 1)
            members = log_probs.gather(2, at)[:, :, 0].to(scores.dtype)
            scores = scores + members
            self._note(rows, chosen, log_probs, mixture, members, weights)
            left = []
            for place, row in enumerate(rows):
                ended = self._ended(row, stops)
                if ended is None:
                    left.append(place)
                else:
                    yield row.index, row.trace(ended)
            if not left:
                return
            tokens = chosen[:, None]
            if len(left) < len(rows):
                keep = torch.tensor(left, device=self._device)
                for side in passes:
                    of_members = torch.arange(side.members, device=self._device)[:, None] * len(rows)
                    keep_rows(side.cache, (of_members + keep).flatten())
                rows = [rows[place] for place in left]
                tokens, mask, positions, scores = tokens[keep], mask[keep], positions[keep], scores[:, keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
            log_probs = self._forward(passes, tokens, mask, positions)

    def _note(
        self,
        rows: Sequence[_Row],
        chosen: torch.Tensor,
        log_probs: torch.Tensor,
        mixture: torch.Tensor,
        members: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        measures = token_measures(log_probs)
        of_mixture = mixture.gather(1, chosen[:, None])[:, 0]
        # one transfer a token, not one a number
        of_all = torch.stack([of_mixture, *measures, effective_members(weights)])
        seen = torch.cat([of_all.to(members.dtype), members])
        for row, token, column in zip(rows, chosen.tolist(), seen.T.cpu().numpy(), strict=True):
            row.tokens.append(token)
            row.seen.append(column)

    def _ended(self, row: _Row, stops: Stops) -> Ended | None:
        if row.tokens[-1] in self.end_tokens:
            return "end_token"
        if stops(row.tokens):
            return "stop_string"
        return "length" if len(row.tokens) >= row.prompt.max_new_tokens else None

    def _read(
        self,
        passes: Sequence[_Pass],
        prompts: Sequence[Prompt],
        shared: int,
        mask: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Fill the caches with the prompts; return every member's next-token log-probabilities [N, B, V]."""
        if self._reader is None:
            tokens = torch.full_like(mask, self._pad)
            for row, prompt in zip(tokens, prompts, strict=True):
                row[len(row) - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
            return self._forward(passes, tokens, mask, positions)
        log_probs, key_values = self._reader.read([prompt.tokens for prompt in prompts], shared)
        for side in passes:
            of_side, key_values = key_values[: side.members], key_values[side.members :]
            for layer in sorted(of_side[0]):
                # one layer at a time, so that what was read and what is cached are never both there whole
                keys, values = map(
                    torch.cat, zip(*(of_member.pop(layer) for of_member in of_side), strict=True)
                )
                side.cache.update(keys, values, layer)
        return log_probs.to(self._device)

    def _forward(
        self, passes: Sequence[_Pass], tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return every member's next-token log-probabilities [N, B, V], float32, or float64 of a model that is."""
        found = []
        for side in passes:
            inputs = {"input_ids": tokens, "attention_mask": mask}
            if self._takes_positions:
                inputs["position_ids"] = positions
            of_members = {name: value.repeat(side.members, 1) for name, value in inputs.items()}
            remembered = {self._cache_argument: side.cache}
            with side.enter(), torch.inference_mode():
                output = self._model(**of_members, **remembered, use_cache=True, **self._last_only)
            logits = output.logits[:, -1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            found.append(torch.log_softmax(logits, dim=-1).view(side.members, len(tokens), -1))
        return (found[0] if len(found) == 1 else torch.cat(found)).to(self._device)

    def _refuse_nonfinite(self, log_probs: torch.Tensor, mixture: torch.Tensor, rows: Sequence[_Row]) -> None:
        # one NaN logit makes a member's whole row NaN, and with it the mixture's
        if torch.isnan(mixture[:, 0]).any():
            member, place = torch.isnan(log_probs[:, :, 0]).nonzero()[0].tolist()
            raise NonFiniteLogitsError(member, rows[place].index)
