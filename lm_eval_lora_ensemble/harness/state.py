"""What a task of lm-eval remembers of its run so that it, and its groups, can aggregate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lm_eval_lora_ensemble.errors import EnsembleError, nearest
from lm_eval_lora_ensemble.metrics.calibration import DEFAULT_BINS
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import METRICS

TWIN = "_norm"
"""What the name of a metric of length-normalised scores ends in."""

TEMPERATURE = f"temperature{TWIN}"
"""Their scale."""


def is_twin(name: str) -> bool:
    """Whether a metric's name in a YAML means one of length-normalised scores."""
    return name == TEMPERATURE or (name.endswith(TWIN) and name.removesuffix(TWIN) in METRICS)


class ScoredDocument(NamedTuple):
    """A document as a metric of all documents needs it.

    Attributes:
        members: (N, C) loglikelihoods, nats.
        golds: indices of its right choices; empty where they are not known.
        lengths: of each choice by unit; empty where choices are contexts.
        fold: of a cross-fit.
    """

    members: Sequence[Sequence[float]]
    golds: Sequence[int]
    lengths: Mapping[str, Sequence[float]]
    fold: int


@dataclass
class UncertaintyState:
    """A task's settings, and what it reported.

    Attributes:
        bins: number of equal-width bins of the calibration metrics.
        other_class: add the paper's class "other" to single-letter choices.
        metrics: further metrics of the registry to put into lm-eval's table.
        normalise: whether the length-normalised twins are reported; None lets the task decide.
        reported: by the name in lm-eval's table, the registry's name; empty until the task reports any.
        documents: all of them, once lm-eval aggregates.
        twins: by the name in lm-eval's table, the registry's name of each length-normalised twin; likewise.
        normalised: what the twins are of; None where no scale could be fitted.
        scale: T of the twins, where the model brings one from validation; None cross-fits.
    """

    bins: int = DEFAULT_BINS
    other_class: bool = False
    metrics: Sequence[str] = ()
    normalise: bool | None = None
    reported: dict[str, str] = field(default_factory=dict, init=False)
    documents: Sequence[ScoredDocument] = field(default=(), init=False)
    twins: dict[str, str] = field(default_factory=dict, init=False)
    normalised: Predictions | None = field(default=None, init=False)
    scale: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS and not is_twin(name):
                twins = [TEMPERATURE, *(f"{known}{TWIN}" for known in METRICS)]
                near = nearest(name, twins if name.endswith(TWIN) else METRICS, cutoff=0.0)
                raise EnsembleError(f"uncertainty has no metric {name!r}; the nearest is {near!r}")


def state_of(task: Any) -> UncertaintyState:
    """Return a task's state, made now if it is a stock task that reports for the first time."""
    if "_uncertainty" not in vars(task):
        task._uncertainty = UncertaintyState()
    state: UncertaintyState = task._uncertainty
    return state


def has_reported(task: Any) -> bool:
    """Whether the task has reported any of our metrics in this run."""
    return "_uncertainty" in vars(task) and bool(state_of(task).reported)
