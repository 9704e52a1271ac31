"""How every metric moves as members are added: is the ensemble large enough?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.calibration import DEFAULT_BINS
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import METRICS


@dataclass(frozen=True)
class SizeMetrics:
    """Every metric of ensembles of k members.

    Attributes:
        members: k.
        subsets: how many ensembles of k members were measured.
        exhaustive: whether these are all that there are.
        mean: over the subsets, by metric.
        spread: standard deviation over the subsets, by metric; NaN for a single subset. Subsets share
            members, so this understates the spread of ensembles trained anew as k nears N.
    """

    members: int
    subsets: int
    exhaustive: bool
    mean: dict[str, float]
    spread: dict[str, float]


def subsets_of(members: int, size: int, limit: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Return all subsets of ``size`` members, or ``limit`` different ones drawn at random."""
    if math.comb(members, size) <= limit:
        return list(itertools.combinations(range(members), size))
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < limit:
        drawn.add(tuple(sorted(rng.choice(members, size, replace=False).tolist())))
    return sorted(drawn)


def by_size(
    predictions: Predictions,
    *,
    bins: int = DEFAULT_BINS,
    max_subsets: int = 32,
    seed: int = 0,
    metrics: Collection[str] = METRICS,
) -> list[SizeMetrics]:
    """Measure ensembles of k = 1 … N members.

    Args:
        predictions: of N members, with gold answers.
        bins: of the binned calibration errors.
        max_subsets: measure all subsets of a size if there are at most so many, else as many at random.
        seed: of that choice.
        metrics: names of those to measure.

    Returns:
        N rows, k ascending.

    Raises:
        EnsembleError: unknown gold answers that a metric needs, ``bins`` < 1, or ``max_subsets`` < 1.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> scores = [[[0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, 1.0]]]  # the second member gets one wrong
        >>> predictions = metrics.Predictions.from_scores(scores, gold=[1, 0])
        >>> rows = metrics.by_size(predictions, metrics=["accuracy"])
        >>> [(row.members, row.subsets, row.mean["accuracy"]) for row in rows]
        [(1, 2, 0.75), (2, 1, 1.0)]
    """
    if max_subsets < 1:
        raise EnsembleError(f"max_subsets is {max_subsets}; at least one subset of each size is needed")
    rng, n = np.random.default_rng(seed), predictions.n_members
    every = np.ones((1, predictions.n_documents))
    rows = []
    for k in range(1, n + 1):
        chosen = subsets_of(n, k, max_subsets, rng)
        measured = [Battery(predictions.only(subset), bins, metrics)(every) for subset in chosen]
        table = {name: np.array([float(m[name][0]) for m in measured]) for name in measured[0]}
        with np.errstate(invalid="ignore"):  # an infinite nll has no spread
            spread = {name: float(v.std(ddof=1)) if len(v) > 1 else float("nan") for name, v in table.items()}
        rows.append(
            SizeMetrics(
                members=k,
                subsets=len(chosen),
                exhaustive=len(chosen) == math.comb(n, k),
                mean={name: float(v.mean()) for name, v in table.items()},
                spread=spread,
            )
        )
    return rows
