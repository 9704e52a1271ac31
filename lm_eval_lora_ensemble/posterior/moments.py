"""First and second moments of a run's snapshots, tensor by tensor: never all snapshots in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.contract import Source, SourceAdapter


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type that a computed tensor is written in: float32, or the stored type where that is wider.

    PEFT computes a half-precision adapter in float32, and noise of one part in a thousand is lost in bfloat16.
    """
    return torch.promote_types(dtype, torch.float32)


def last_of(source: Source, last: int | None, *, at_least: int, method: str) -> tuple[SourceAdapter, ...]:
    """Return the last snapshots of a run, in order.

    Args:
        source: the snapshots.
        last: how many; None for all.
        at_least: how many the method needs.
        method: its name, for messages.

    Raises:
        EnsembleError: there are fewer.
    """
    there = len(source.adapters)
    if last is not None and last > there:
        raise EnsembleError(
            f"last={last}: {source.folder} has {there} snapshots; give a number up to {there}"
        )
    taken = source.adapters[there - (there if last is None else last) :]
    if len(taken) < at_least:
        raise EnsembleError(
            f"{method} needs at least {at_least} snapshots and has {len(taken)} of {source.folder}; "
            "train with more kept (the recipe keys epochs and keep_snapshots), or ask for less"
        )
    return taken


def running_means(values: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each value with the mean of all values so far, itself included, both in float64."""
    mean = None
    for n, value in enumerate(values, start=1):
        exact = value.to(torch.float64)
        # a difference that is 0 leaves the mean as it is, so that constant tensors stay what they are, bit for bit
        mean = exact if mean is None else mean + (exact - mean) / n
        yield exact, mean


def mean_of(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of at least one tensor, computed in float64, in the type that :func:`wide` names."""
    *_, (_, mean) = running_means(values)
    return mean.to(wide(values[0].dtype))
