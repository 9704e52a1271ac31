"""One run against another on the same documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.run import Run, other_protocols
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics import disagreement
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate, Statistics, bootstrap
from lm_eval_lora_ensemble.metrics.predictions import Predictions, check_same_documents


class NothingInCommonError(EnsembleError):
    """Two runs without a task on which they could be compared."""


@dataclass(frozen=True)
class Comparison:
    """Run A against run B on the same documents of one task.

    Attributes:
        documents: D.
        difference: A minus B by metric, paired over the same resamples.
        agreement: share of documents for which both predict the same choice.
        total_variation: mean total variation distance of the two distributions, in [0, 1].
        note: what a reader must know, such as different numbers of examples in the context; empty where nothing.
    """

    documents: int
    difference: dict[str, Estimate]
    agreement: Estimate
    total_variation: Estimate
    note: str = ""


def compare(a: Run, b: Run, settings: Settings | None = None) -> dict[str, Comparison]:
    """Compare two runs on the tasks and groups both have.

    Args:
        a: of any model.
        b: of any other, on the same documents.
        settings: bins, resamples, seed, level.

    Returns:
        A comparison by task or group with the same documents in both runs; differences are ``a`` minus ``b``.

    Raises:
        NothingInCommonError: no task in common with the same documents and known right answers.

    Example:
        >>> from lm_eval_lora_ensemble import compare, load_runs
        >>> (run,) = load_runs("results")
        >>> float(compare(run, run)["both"].difference["nll"].value)
        0.0
    """
    chosen = settings or Settings()
    shared = [name for name in a.names() if name in b]
    apart = why_not_compared(a, b)
    if len(apart) == len(shared):
        strings = "; whole strings are not compared" if a.strings or b.strings else ""
        why = "".join(f"; {name}: {reason}" for name, reason in apart.items())
        can_be = " that can be compared" if shared else ""
        raise NothingInCommonError(f"{a.source} and {b.source} have no task in common{can_be}{strings}{why}")
    results = {}
    for name in (name for name in shared if name not in apart):
        first, second = a.predictions(name), b.predictions(name)
        plan = chosen.plan(name, first)
        difference = bootstrap(Battery(first, chosen.bins), plan).minus(
            bootstrap(Battery(second, chosen.bins), plan)
        )
        between = bootstrap(distance_statistics(first, second), plan)
        results[name] = Comparison(
            documents=first.n_documents,
            difference={n: difference.estimate(n) for n in difference.value},
            agreement=between.estimate("agreement"),
            total_variation=between.estimate("total_variation"),
            note=other_protocols(a, b, name),
        )
    return results


def why_not_compared(a: Run, b: Run) -> dict[str, str]:
    """Return the tasks and groups that both runs have and :func:`compare` leaves out, and why."""
    found: dict[str, str] = {}
    for name in (name for name in a.names() if name in b):
        first, second = a.predictions(name), b.predictions(name)
        unknown = [p.missing_gold for p in (first, second) if p.is_gold is None]
        try:
            check_same_documents(first, second)
        except EnsembleError as error:
            found[name] = str(error)
        if unknown:
            found[name] = f"right answers are unknown: {unknown[0]}"
    return found


def distance_statistics(a: Predictions, b: Predictions) -> Statistics:
    """Return ``agreement`` and ``total_variation`` of two ensembles as a function of document weights.

    Raises:
        EnsembleError: other documents in one than in the other.
    """
    check_same_documents(a, b)
    values = np.stack(
        [
            disagreement.agreement(a.mixture, b.mixture),
            disagreement.total_variation(a.mixture, b.mixture),
        ],
        axis=1,
    )

    def means(weights: FloatArray) -> dict[str, FloatArray]:
        same, distance = (weights @ values / weights.sum(axis=1, keepdims=True)).T
        return {"agreement": same, "total_variation": distance}

    return means
