"""Documents as one rectangular forward pass: rows, masks, and where the scored tokens are.

A document's choices share their context. Laid out as a *tree* (:mod:`..tree.rows`), a row holds every distinct token
position once, and every token sees exactly what it would see in a row of its own.

All widths (row length, number of choices, tokens of the longest answer) come from the data set or from the
length group, never from the batch at hand: a member's arithmetic then has the same shape whoever shares its
batch, which is what makes a member trained jointly equal to the member trained alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lm_eval_lora_ensemble.train.examples import Choice, Example
from lm_eval_lora_ensemble.train.scale import SUMMED, ChoiceScale
from lm_eval_lora_ensemble.tree.requests import TokenRequest
from lm_eval_lora_ensemble.tree.rows import IntArray, RowBatch, TreeRow, chain, lay_out
from lm_eval_lora_ensemble.tree.trie import PrefixTrie


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs: N members × D documents × C choices; R rows, L tokens, T scored ones.

    Attributes:
        input_ids: [R, L], right-padded.
        mask: additive [R, 1, L, L] for tree rows; None where causal attention alone is right.
        position_ids: [R, L] for tree rows, else None.
        scored: [P] distinct flat indices into [R · L] of the outputs that predict a scored token, one member's
            after another's.
        output: [N, D, C, T] index into ``scored`` of each scored token's prediction.
        target: [N, D, C, T] the scored tokens.
        weight: float32 [N, D, C, T], 1 for a token, 0 for padding.
        divisor: float32 [N, D, C], what a choice's loglikelihood is divided by in the objective; 1 for padding.
        is_choice: bool [N, D, C], False for padding.
        is_gold: bool [N, D, C].
    """

    input_ids: torch.Tensor
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    scored: torch.Tensor
    output: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    divisor: torch.Tensor
    is_choice: torch.Tensor
    is_gold: torch.Tensor

    @property
    def tokens(self) -> int:
        """Input tokens of the forward pass, padding included."""
        return self.input_ids.numel()

    def scored_per_member(self) -> list[int]:
        """Return how many of ``scored`` are each member's; they add up to P."""
        members = len(self.output)
        of_member = self.scored // (self.tokens // members)
        counts: list[int] = of_member.bincount(minlength=members).tolist()
        return counts


def as_request(choice: Choice) -> TokenRequest:
    """Return a choice as the evaluation scores it: the last token is only predicted."""
    return TokenRequest((choice.context + choice.continuation)[:-1], choice.continuation)


@dataclass(frozen=True)
class _DocumentRows:
    """A document's rows, and for each choice (row, place in it whose output predicts the token, token) triples."""

    rows: tuple[TreeRow, ...]
    targets: tuple[tuple[tuple[int, int, int], ...], ...]


def _lay_out(choices: Sequence[Choice], *, use_tree: bool) -> _DocumentRows:
    """Write a document as one tree row, or as one ordinary row a choice: a function of the document alone."""
    requests = [as_request(choice) for choice in choices]
    if not use_tree:
        rows = tuple(chain(request.tokens) for request in requests)
        return _DocumentRows(
            rows,
            tuple(
                _targets(r, i, row.paths[0]) for i, (r, row) in enumerate(zip(requests, rows, strict=True))
            ),
        )
    trie = PrefixTrie(requests)
    row = lay_out(trie, 0, len(trie.sequences))
    path_of = {request: row.paths[s] for s, members in enumerate(trie.requests_of) for request in members}
    return _DocumentRows((row,), tuple(_targets(r, 0, path_of[c]) for c, r in enumerate(requests)))


def _targets(request: TokenRequest, row: int, path: IntArray) -> tuple[tuple[int, int, int], ...]:
    places = path[len(path) - len(request.targets) :].tolist()
    return tuple((row, place, token) for place, token in zip(places, request.targets, strict=True))


class Layout:
    """The rows of a data set, and their assembly into batches.

    Args:
        examples: the data set.
        gold_only: lay out the (first) right choice of each document and nothing else.
        use_tree: one tree row a document, rather than one ordinary row a choice.
        dtype: of the model, which its attention mask must have.
        scale: how the objective scales the choices' loglikelihoods.

    Raises:
        EnsembleError: the scale is by characters, and a choice has none.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        gold_only: bool,
        use_tree: bool,
        dtype: torch.dtype,
        scale: ChoiceScale = SUMMED,
    ) -> None:
        self.gold = [(0,) if gold_only else example.gold for example in examples]
        chosen = [
            (example.choices[example.gold[0]],) if gold_only else example.choices for example in examples
        ]
        self.use_tree = use_tree and not gold_only
        self.choices = max(map(len, chosen))
        self.answer_tokens = max(len(c.continuation) for choices in chosen for c in choices)
        self.dtype = dtype
        self.divisors = [scale.divisors(example) for example in examples] if not gold_only else None
        self.documents = [_lay_out(c, use_tree=self.use_tree) for c in chosen]
        self.rows_per_document = 1 if self.use_tree else self.choices

    def __len__(self) -> int:
        return len(self.documents)

    def lengths(self) -> list[int]:
        """Return the longest row of each document, in tokens."""
        return [max(map(len, document.rows)) for document in self.documents]

    def batch(self, documents: Sequence[Sequence[int]], length: int, device: torch.device) -> Batch:
        """Assemble the given documents of each of N members, padded to ``length`` tokens.

        Every member brings the same number of documents.
        """
        N, D, C, T = len(documents), len(documents[0]), self.choices, self.answer_tokens
        flat = [document for ids in documents for document in ids]
        rows = RowBatch.pad([row for document in flat for row in self._padded(document)], length)
        places: dict[int, int] = {}
        output = torch.zeros(N * D, C, T, dtype=torch.long)
        target = torch.zeros(N * D, C, T, dtype=torch.long)
        weight = torch.zeros(N * D, C, T)
        divisor = torch.ones(N * D, C)
        is_gold = torch.zeros(N * D, C, dtype=torch.bool)
        for d, document in enumerate(flat):
            is_gold[d, list(self.gold[document])] = True
            if self.divisors:
                divisor[d, : len(self.divisors[document])] = torch.tensor(self.divisors[document])
            for c, targets in enumerate(self.documents[document].targets):
                for t, (row, place, token) in enumerate(targets):
                    flat_place = (d * self.rows_per_document + row) * length + place
                    output[d, c, t] = places.setdefault(flat_place, len(places))
                    target[d, c, t] = token
                    weight[d, c, t] = 1.0
        rows = rows.to(device)
        return Batch(
            input_ids=rows.input_ids,
            mask=rows.attention_mask(self.dtype) if self.use_tree else None,
            position_ids=rows.position_ids if self.use_tree else None,
            scored=torch.tensor(list(places), device=device),
            output=output.view(N, D, C, T).to(device),
            target=target.view(N, D, C, T).to(device),
            weight=weight.view(N, D, C, T).to(device),
            divisor=divisor.view(N, D, C).to(device),
            is_choice=(weight.sum(-1) > 0).view(N, D, C).to(device),
            is_gold=is_gold.view(N, D, C).to(device),
        )

    def _padded(self, document: int) -> Sequence[TreeRow]:
        """Return a document's rows, filled up to the same number for every document."""
        rows = self.documents[document].rows
        return (*rows, *[chain((0,))] * (self.rows_per_document - len(rows)))
