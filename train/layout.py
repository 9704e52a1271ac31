"""Documents as one rectangular forward pass: rows, masks, and where the scored tokens are.

A document's choices share their context. Laid out as a *tree*, a row holds the common prefix once and every
choice's own tokens after it; a mask lets each choice see the prefix and itself only, and position ids restart
at the prefix's end, so every token sees exactly what it would see in a row of its own.

All widths (row length, number of choices, tokens of the longest answer) come from the data set or from the
length group, never from the batch at hand: a member's arithmetic then has the same shape whoever shares its
batch, which is what makes a member trained jointly equal to the member trained alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lm_eval_lora_ensemble.train.examples import Choice, Example


@dataclass(frozen=True)
class Row:
    """One sequence of a forward pass.

    Attributes:
        tokens: input tokens.
        positions: position id of each.
        branches: 0 for the shared prefix, c + 1 for tokens that only choice c sees.
        targets: per choice, (position in the row whose output predicts the token, the token).
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[int, ...]
    targets: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs: N members × D documents × C choices; R rows, L tokens, T scored ones.

    Attributes:
        input_ids: [R, L], right-padded.
        mask: bool [R, 1, L, L] for tree rows; None where causal attention alone is right.
        position_ids: [R, L] for tree rows, else None.
        scored: [P] distinct flat indices into [R · L] of the outputs that predict a scored token.
        output: [N, D, C, T] index into ``scored`` of each scored token's prediction.
        target: [N, D, C, T] the scored tokens.
        weight: float32 [N, D, C, T], 1 for a token, 0 for padding.
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
    is_choice: torch.Tensor
    is_gold: torch.Tensor

    @property
    def tokens(self) -> int:
        """Input tokens of the forward pass, padding included."""
        return self.input_ids.numel()


def chain(choice: Choice) -> Row:
    """Lay out one choice as an ordinary sequence."""
    tokens = (choice.context + choice.continuation)[:-1]
    start = len(choice.context) - 1
    targets = tuple((start + i, token) for i, token in enumerate(choice.continuation))
    return Row(tokens, tuple(range(len(tokens))), (0,) * len(tokens), (targets,))


def tree(choices: Sequence[Choice]) -> Row:
    """Lay out all choices of a document over their longest common prefix."""
    sequences = [(choice.context + choice.continuation)[:-1] for choice in choices]
    shared = _common_prefix(sequences)
    tokens, positions = list(sequences[0][:shared]), list(range(shared))
    branches = [0] * shared
    targets = []
    for c, (choice, sequence) in enumerate(zip(choices, sequences, strict=True)):
        offset = len(tokens) - shared  # a token of this choice's own at position p stands at p + offset
        tokens += sequence[shared:]
        positions += range(shared, len(sequence))
        branches += [c + 1] * (len(sequence) - shared)
        start = len(choice.context) - 1
        targets.append(
            tuple(
                (start + i + (offset if start + i >= shared else 0), token)
                for i, token in enumerate(choice.continuation)
            )
        )
    return Row(tuple(tokens), tuple(positions), tuple(branches), tuple(targets))


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    shortest = min(len(sequence) for sequence in sequences)
    for i in range(shortest):
        if any(sequence[i] != sequences[0][i] for sequence in sequences[1:]):
            return i
    return shortest


class Layout:
    """The rows of a data set, and their assembly into batches.

    Args:
        examples: the data set.
        gold_only: lay out the (first) right choice of each document and nothing else.
        use_tree: one tree row a document, rather than one ordinary row a choice.
    """

    def __init__(self, examples: Sequence[Example], *, gold_only: bool, use_tree: bool) -> None:
        self.gold = [(0,) if gold_only else example.gold for example in examples]
        chosen = [
            (example.choices[example.gold[0]],) if gold_only else example.choices for example in examples
        ]
        self.use_tree = use_tree and not gold_only
        self.choices = max(map(len, chosen))
        self.answer_tokens = max(len(c.continuation) for choices in chosen for c in choices)
        self.rows = [[tree(c)] if self.use_tree else [chain(choice) for choice in c] for c in chosen]
        self.rows_per_document = 1 if self.use_tree else self.choices

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> list[int]:
        """Return the longest row of each document, in tokens."""
        return [max(len(row.tokens) for row in rows) for rows in self.rows]

    def batch(self, documents: Sequence[Sequence[int]], length: int, device: torch.device) -> Batch:
        """Assemble the given documents of each of N members, padded to ``length`` tokens.

        Every member brings the same number of documents.
        """
        N, D, C, T = len(documents), len(documents[0]), self.choices, self.answer_tokens
        rows = [row for ids in documents for document in ids for row in self._padded(self.rows[document])]
        places: dict[int, int] = {}
        output = torch.zeros(N * D, C, T, dtype=torch.long)
        target = torch.zeros(N * D, C, T, dtype=torch.long)
        weight = torch.zeros(N * D, C, T)
        is_gold = torch.zeros(N * D, C, dtype=torch.bool)
        for d, document in enumerate(document for ids in documents for document in ids):
            is_gold[d, list(self.gold[document])] = True
            for c, (row, targets) in enumerate(self._targets(document)):
                base = (d * self.rows_per_document + row) * length
                for t, (position, token) in enumerate(targets):
                    output[d, c, t] = places.setdefault(base + position, len(places))
                    target[d, c, t] = token
                    weight[d, c, t] = 1.0
        mask, position_ids = _tree_mask(rows, length) if self.use_tree else (None, None)
        return Batch(
            input_ids=_pad([row.tokens for row in rows], length).to(device),
            mask=None if mask is None else mask.to(device),
            position_ids=None if position_ids is None else position_ids.to(device),
            scored=torch.tensor(list(places), device=device),
            output=output.view(N, D, C, T).to(device),
            target=target.view(N, D, C, T).to(device),
            weight=weight.view(N, D, C, T).to(device),
            is_choice=(weight.sum(-1) > 0).view(N, D, C).to(device),
            is_gold=is_gold.view(N, D, C).to(device),
        )

    def _padded(self, rows: list[Row]) -> list[Row]:
        """Fill up to the same number of rows for every document."""
        return rows + [Row((0,), (0,), (0,), ((),))] * (self.rows_per_document - len(rows))

    def _targets(self, document: int) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
        """Return (row within the document, targets) of each choice."""
        rows = self.rows[document]
        if self.use_tree:
            return [(0, targets) for targets in rows[0].targets]
        return [(i, row.targets[0]) for i, row in enumerate(rows)]


def _pad(sequences: Sequence[Sequence[int]], length: int, fill: int = 0) -> torch.Tensor:
    """Right-pad to [R, length]. The fill is never seen by a real token, so any valid id will do."""
    return torch.tensor([[*sequence, *[fill] * (length - len(sequence))] for sequence in sequences])


def _tree_mask(rows: Sequence[Row], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention mask [R, 1, L, L] and the position ids [R, L] of tree rows.

    A padding position sees the prefix and the padding before it: a row of the mask that allowed nothing
    would make its softmax NaN.
    """
    branches = _pad([row.branches for row in rows], length, fill=-1)
    queries, keys = branches[:, None, :, None], branches[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & ((keys == 0) | (keys == queries))
    return mask, _pad([row.positions for row in rows], length)


def use_tree_rows(model: Any, examples: Sequence[Example]) -> bool:
    """Whether tree rows are both possible with this model and fewer tokens.

    Possible: attention that takes an arbitrary mask, positions given by ids, and no window (or none that a
    row could outgrow). Recurrent layers see a row in order, whatever the mask; ALiBi models take no ids.
    """
    config = model.config.get_text_config()
    longest = max(len(tree(example.choices).tokens) for example in examples)
    window = getattr(config, "sliding_window", None) or longest
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    possible = (
        config._attn_implementation in {"sdpa", "eager"}
        and "position_ids" in inspect.signature(model.forward).parameters
        and kinds <= {"full_attention", "sliding_attention"}
        and not getattr(config, "alibi", False)
        and longest <= window
    )
    return possible and tree_saving(examples) > 1


def tree_saving(examples: Sequence[Example]) -> float:
    """Return how many times fewer tokens tree rows take than one row a choice."""
    rows = sum(len(chain(choice).tokens) for example in examples for choice in example.choices)
    return rows / sum(len(tree(example.choices).tokens) for example in examples)
