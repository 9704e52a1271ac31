"""The plain path: padded batches, the whole sequence of every request, members one after another.

It is what lm-eval's ``hf`` does, once per member, for every model ``hf`` can load. The packed path must give
the same numbers and runs instead wherever it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lm_eval_lora_ensemble.scoring.greedy import MixtureArgmax
from lm_eval_lora_ensemble.scoring.loglikelihood import Score
from lm_eval_lora_ensemble.tree.requests import TokenRequest


class Batch(NamedTuple):
    """Padded input of one forward pass.

    Attributes:
        inputs: int64 [B, L], right-padded (left-padded for an encoder).
        encoder_mask: int64 [B, L] for an encoder–decoder, else None.
        labels: int64 [B, T] for an encoder–decoder, else None.
        rows: per request, the slice of logit positions that predict its targets.
    """

    inputs: torch.Tensor
    encoder_mask: torch.Tensor | None
    labels: torch.Tensor | None
    rows: list[slice]


# (member, batch) -> logits [B, L, V]
Forward = Callable[[int, Batch], torch.Tensor]


def score_plain(
    requests: Sequence[TokenRequest],
    forward: Forward,
    *,
    n_members: int,
    batch_size: int,
    device: torch.device,
    encoder_decoder: bool = False,
) -> Iterator[tuple[int, Score]]:
    """Score ``requests`` in batches of ``batch_size``, longest first; yield (index, score) as batches finish."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        chunk = [requests[i] for i in chosen]
        batch = _collate(chunk, device, encoder_decoder)
        yield from zip(chosen, _score_batch(batch, chunk, forward, n_members), strict=True)


def _score_batch(
    batch: Batch, chunk: Sequence[TokenRequest], forward: Forward, n_members: int
) -> list[Score]:
    mixtures = [MixtureArgmax() for _ in chunk]
    targets = [torch.tensor(request.targets, device=batch.inputs.device) for request in chunk]
    sums = np.empty((len(chunk), n_members))
    for member in range(n_members):
        logits = forward(member, batch)
        for i, rows in enumerate(batch.rows):
            log_probs = torch.log_softmax(logits[i, rows], dim=-1, dtype=torch.float32)
            chosen = log_probs.gather(1, targets[i][:, None]).squeeze(1)
            sums[i, member] = chosen.cpu().double().sum().item()
            mixtures[i].add(log_probs, chosen.cumsum(0) - chosen)
    return [Score(sums[i], bool(mixtures[i].matches(targets[i]).all())) for i in range(len(chunk))]


def _collate(chunk: Sequence[TokenRequest], device: torch.device, encoder_decoder: bool) -> Batch:
    length = max(len(request.tokens) for request in chunk)
    inputs = torch.zeros(len(chunk), length, dtype=torch.long)
    if not encoder_decoder:
        for row, request in zip(inputs, chunk, strict=True):
            row[: len(request.tokens)] = torch.tensor(request.tokens)
        rows = [slice(len(r.tokens) - len(r.targets), len(r.tokens)) for r in chunk]
        return Batch(inputs.to(device), None, None, rows)
    mask = torch.zeros_like(inputs)
    labels = torch.zeros(len(chunk), max(len(request.targets) for request in chunk), dtype=torch.long)
    for i, request in enumerate(chunk):
        inputs[i, : len(request.tokens)] = torch.tensor(request.tokens)
        mask[i, : len(request.tokens)] = 1
        labels[i, : len(request.targets)] = torch.tensor(request.targets)
    rows = [slice(0, len(request.targets)) for request in chunk]
    return Batch(inputs.to(device), mask.to(device), labels.to(device), rows)
