"""A study's folder: what was asked for, what is done, and how figures of it are saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from matplotlib.figure import Figure

from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.figures.style import styled
from stepwise.running import Record


class Sizes(Protocol):
    """What is asked for."""

    @property
    def dtype(self) -> str:
        """Of the base model."""

    @property
    def is_trial(self) -> bool:
        """Whether something is smaller than in the study itself, so that its numbers say nothing."""


S = TypeVar("S", bound=Sizes)


@dataclass(frozen=True)
class StudyFolder(Generic[S]):
    """Everything that a page says is made of this, as far as it is done.

    Attributes:
        sizes: what was asked for; other results in the folder are not looked at.
        output: the study's folder.
        records: of the steps that are done.
        settings: bins, resamples, seed and level of every interval.
    """

    sizes: S
    output: Path
    records: Mapping[str, Record]
    settings: Settings


@styled
def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure, the same bytes for the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
