"""The scale of an ensemble's scores: temperatures fitted to a validation or training split, kept in ensemble.json.

Choices' loglikelihoods say how members rank them, not on which scale; for answers written out it depends on their
length. One temperature T from labelled documents sets it: ``p_m(c) = softmax_c(l_m(c) / (T · length(c)))``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray, IntArray
from lm_eval_lora_ensemble.metrics.temperature import (
    TEMPERATURE_RANGE,
    FittedTemperature,
    fit_temperature_of_mixture,
)

SPLITS = ("validation", "training")
SCORES = ("sum", "chars")
FEW_DOCUMENTS = 20
"""Below so many a temperature is hardly known: its standard error is about a half."""


@dataclass(frozen=True)
class Scale:
    """One fitted temperature.

    Attributes:
        temperature: T, within 0.0001 and 100.
        standard_error: of log T; None at a limit and for a single document.
        at_limit: the search ended at a limit: all documents right, or no better than chance.
    """

    temperature: float
    standard_error: float | None
    at_limit: bool

    def __post_init__(self) -> None:
        """Check what came from a file."""
        if not isinstance(self.at_limit, bool):
            raise TypeError("at_limit is neither true nor false")
        low, high = TEMPERATURE_RANGE
        _number("temperature", self.temperature, low, high)
        if self.standard_error is not None:
            _number("standard_error", self.standard_error, 0.0, 1e6)

    @classmethod
    def fitted(cls, fit: FittedTemperature) -> Scale:
        """Return what ensemble.json says of a fit."""
        error = None if math.isnan(fit.standard_error) else fit.standard_error
        return cls(fit.temperature, error, fit.at_limit)

    def as_mapping(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {
            "temperature": self.temperature,
            "standard_error": self.standard_error,
            "at_limit": self.at_limit,
        }


@dataclass(frozen=True)
class Scales:
    """The temperatures of one kind of scores.

    Attributes:
        ensemble: shared by all members, for their mixture; None where not all members are in use.
        members: each member's own, for the member alone.
    """

    ensemble: Scale | None
    members: tuple[Scale, ...]

    def as_mapping(self) -> dict[str, Any]:
        """Return the JSON object; it has no ``ensemble`` where there is none."""
        shared = {} if self.ensemble is None else {"ensemble": self.ensemble.as_mapping()}
        return {**shared, "members": [scale.as_mapping() for scale in self.members]}


@dataclass(frozen=True)
class Calibration:
    """An ensemble's temperatures, and where they are from.

    Attributes:
        task: lm-eval tasks whose documents they were fitted to, separated by commas.
        split: ``validation`` or ``training``; never ``test``.
        documents: how many.
        scores: by the length that divides the loglikelihoods: ``sum`` (1) always, ``chars`` (characters, as
            lm-eval's acc_norm counts them) where every choice has a length.
    """

    task: str
    split: str
    documents: int
    scores: dict[str, Scales]

    def __post_init__(self) -> None:
        """Check what came from a file."""
        if not isinstance(self.task, str) or not self.task.isprintable():
            raise TypeError("the calibration's task is not printable text")
        if self.split not in SPLITS:
            raise ValueError(f"the calibration's split is not one of {', '.join(SPLITS)}")
        if isinstance(self.documents, bool) or not isinstance(self.documents, int) or self.documents < 1:
            raise TypeError("the calibration's documents is no whole number above 0")
        if "sum" not in self.scores or set(self.scores) - set(SCORES):
            raise ValueError(f"the calibration's scores are not sum, with or without {', '.join(SCORES[1:])}")
        if len({len(scales.members) for scales in self.scores.values()}) > 1:
            raise ValueError("the calibration's scores are of different numbers of members")

    @property
    def n_members(self) -> int:
        """Number of members with temperatures of their own."""
        return len(self.scores["sum"].members)

    def of_first(self, members: int) -> Calibration:
        """Return what holds for the first so many members: fewer than all have no shared temperature."""
        if members == self.n_members:
            return self
        kept = {name: Scales(None, scales.members[:members]) for name, scales in self.scores.items()}
        return Calibration(self.task, self.split, self.documents, kept)

    def as_mapping(self) -> dict[str, Any]:
        """Return the JSON object that :meth:`from_mapping` reads."""
        return {
            "task": self.task,
            "split": self.split,
            "documents": self.documents,
            "scores": {name: scales.as_mapping() for name, scales in self.scores.items()},
        }

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> Calibration:
        """Read what :meth:`as_mapping` wrote, in a manifest or a results file.

        Raises:
            TypeError, ValueError, KeyError, AttributeError: it is not that.
        """
        scores = {}
        for name, value in raw["scores"].items():
            unknown = set(value) - {"ensemble", "members"}
            if unknown:
                raise ValueError(f"the calibration's {name} has an unknown key {sorted(unknown)[0]!r}")
            shared = Scale(**value["ensemble"]) if "ensemble" in value else None
            scores[name] = Scales(shared, tuple(Scale(**member) for member in value["members"]))
        return cls(**{**raw, "scores": scores})


def fit_calibration(
    task: str, split: str, loglikelihoods: FloatArray, is_gold: BoolArray, characters: IntArray | None
) -> Calibration:
    """Fit the temperatures of an ensemble and of each member, for every kind of scores that the documents have.

    Args:
        task: where the documents are from.
        split: where in it.
        loglikelihoods: (N, D, C), nats, summed over a choice's tokens; −inf for a choice that the document lacks.
        is_gold: (D, C).
        characters: (D, C), at least 1 for every choice; None leaves out ``chars``.

    Raises:
        EnsembleError: as :func:`.metrics.temperature.fit_temperature_of_mixture`.
    """
    lengths = {"sum": np.ones(is_gold.shape)}
    if characters is not None:
        lengths["chars"] = np.maximum(characters, 1).astype(np.float64)
    scores = {}
    for name, length in lengths.items():
        values = loglikelihoods / length
        members = (fit_temperature_of_mixture(values[m : m + 1], is_gold) for m in range(len(values)))
        shared = fit_temperature_of_mixture(values, is_gold)
        scores[name] = Scales(Scale.fitted(shared), tuple(map(Scale.fitted, members)))
    return Calibration(task, split, len(is_gold), scores)


def in_words(calibration: Calibration) -> list[str]:
    """Return a line a kind of scores: the shared temperature, its error, and the members' own."""
    lines = []
    for name, scales in calibration.scores.items():
        own = ", ".join(f"{scale.temperature:.3g}" for scale in scales.members)
        shared = "" if scales.ensemble is None else f"T {_with_error(scales.ensemble)}, "
        lines.append(
            f"{name}: {shared}members' own {own}; {calibration.documents} {calibration.split} documents of "
            f"{calibration.task}"
        )
    if calibration.documents < FEW_DOCUMENTS:
        lines.append(f"fewer than {FEW_DOCUMENTS} documents hardly determine a temperature")
    return lines


def _with_error(scale: Scale) -> str:
    if scale.at_limit:
        low = scale.temperature < 1
        why = "every document is right" if low else "no better than chance"
        return f"{scale.temperature:g} (its {'lower' if low else 'upper'} limit: {why})"
    error = "" if scale.standard_error is None else f" (log T ± {scale.standard_error:.2g})"
    return f"{scale.temperature:.3g}{error}"


def _number(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"the calibration's {name} is no number from {least:g} to {most:g}")
