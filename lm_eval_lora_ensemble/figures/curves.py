"""Numbers with intervals along a quantity: epochs, dropout, λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.figures.style import (
    BAND,
    GREY,
    axes_or_new,
    caption,
    legend_below,
    look,
    styled,
)
from lm_eval_lora_ensemble.figures.text import legend_name, percent
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate


@dataclass(frozen=True)
class Curve:
    """One line of :func:`plot_curves`.

    Attributes:
        label: its name in the legend.
        x: ascending.
        estimates: one for each x; NaN leaves a gap.

    Raises:
        EnsembleError: from the constructor, without a point, or for lengths that differ.
    """

    label: str
    x: tuple[float, ...]
    estimates: tuple[Estimate, ...]

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.estimates):
            raise EnsembleError(
                f"the curve {self.label!r} has {len(self.x)} positions and {len(self.estimates)} estimates; "
                "as many of both, and at least one, are needed"
            )


@styled
def plot_curves(
    curves: Sequence[Curve],
    *,
    ylabel: str,
    xlabel: str = "epoch",
    reference: float | None = None,
    reference_label: str = "",
    level: float = 0.95,
    note: str = "",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw lines with their intervals as bands.

    Args:
        curves: any number; each has its colour, marker and dashes.
        ylabel: with the unit.
        xlabel: with the unit, if it has one.
        reference: value of a horizontal line, such as the base model's or chance.
        reference_label: its name in the legend.
        level: of the intervals, for the note.
        note: what else a reader has to know, such as the number of documents.
        title: of the figure.
        ax: where to draw; a new figure if left out.

    Raises:
        EnsembleError: no curve.

    Example:
        >>> from lm_eval_lora_ensemble import figures, metrics
        >>> estimate = metrics.Estimate(0.7, 0.1, 0.0, (0.5, 0.9), (0.5, 0.9), (0.5, 0.9))
        >>> curve = figures.Curve("ensemble", x=(1, 2), estimates=(estimate, estimate))
        >>> ax = figures.plot_curves([curve], ylabel="accuracy", reference=0.5, reference_label="chance")
        >>> [line.get_label() for line in ax.get_lines()]
        ['ensemble', 'chance']
    """
    if not curves:
        raise EnsembleError(f"there is no curve to draw of {ylabel!r}")
    ax = axes_or_new(ax, height=4.2 + 0.12 * len(curves))
    for index, curve in enumerate(curves):
        _line(curve, index, ax)
    if reference is not None:
        ax.axhline(
            reference,
            color=GREY,
            linestyle=(0, (1, 1.5)),
            linewidth=1.4,
            label=legend_name(reference_label or f"reference {reference:g}"),
        )
    x = [position for curve in curves for position in curve.x]
    if all(float(position).is_integer() for position in x):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    explained = f"bands: {percent(level)} interval over resampled documents"
    caption(ax, title, f"{note}; {explained}" if note else explained)
    legend_below(ax)
    return ax


def _line(curve: Curve, index: int, ax: Axes) -> None:
    chosen = look(index)
    value = np.array([estimate.value for estimate in curve.estimates])
    low, high = np.array([estimate.quoted[:2] for estimate in curve.estimates]).T
    ax.fill_between(curve.x, low, high, color=chosen.colour, alpha=BAND, linewidth=0)
    if len(curve.x) == 1:  # a band of no width does not show
        ax.vlines(curve.x, low, high, color=chosen.colour, linewidth=1.4)
    ax.plot(
        curve.x,
        value,
        color=chosen.colour,
        marker=chosen.marker,
        linestyle=chosen.dashes,
        label=legend_name(curve.label),
    )
