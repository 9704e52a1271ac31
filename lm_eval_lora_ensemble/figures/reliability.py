"""Is confidence borne out? The reliability diagram, and the confidences of right and of wrong answers."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lm_eval_lora_ensemble.figures.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    axes_or_new,
    caption,
    legend_below,
    styled,
)
from lm_eval_lora_ensemble.figures.text import documents, percent
from lm_eval_lora_ensemble.metrics.calibration import (
    DEFAULT_BINS,
    ReliabilityBin,
    bin_edges,
    expected_calibration_error,
    reliability_table,
)
from lm_eval_lora_ensemble.metrics.predictions import Predictions

_CHARACTERS = 60
"""How many digits fit side by side along the axis; more are turned upright."""

_NUMBERED_BINS = 40
"""Upright numbers of more bins would touch each other."""


@styled
def plot_reliability(
    predictions: Predictions,
    *,
    bins: int = DEFAULT_BINS,
    level: float = 0.95,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw accuracy against confidence, bin by bin (DeGroot & Fienberg 1983).

    A bin's point lies at its mean confidence, with Wilson's interval of its accuracy; the bar from the
    diagonal to it is the gap that ECE averages. Numbers of documents stand along the bottom.

    Args:
        predictions: with gold answers.
        bins: of equal width.
        level: of the intervals.
        title: of the figure.
        ax: where to draw; a new figure if left out.

    Raises:
        EnsembleError: unknown gold answers, ``bins`` < 1, ``level`` outside (0, 1).

    Example:
        >>> from lm_eval_lora_ensemble import figures, metrics
        >>> predictions = metrics.Predictions.from_scores([[2.0, 0.0], [0.0, 1.0]], gold=[0, 0])
        >>> ax = figures.plot_reliability(predictions)
        >>> [text.get_text() for text in ax.texts if text.get_text().isdigit()]  # documents in each filled bin
        ['1', '1']
    """
    confidence, correct = predictions.confidence, predictions.correct
    table = reliability_table(confidence, correct, bins, level=level)
    ax = axes_or_new(ax, height=5.0)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (5, 3)), linewidth=1.2, label="perfectly calibrated")
    _bin_points([row for row in table if row.n], level, ax)
    _bin_counts(table, ax)
    ax.set(xlim=(0, 1), xlabel="mean confidence max p̄ (probability)", ylabel="accuracy (share right)")
    ece = expected_calibration_error(confidence, correct, bins)
    caption(
        ax,
        title,
        f"ECE = {ece:.3f} ({bins} bins of equal width), {documents(predictions.n_documents)}; "
        f"accuracy {correct.mean():.3f}, mean confidence {confidence.mean():.3f}",
    )
    legend_below(ax)
    return ax


def _bin_points(rows: list[ReliabilityBin], level: float, ax: Axes) -> None:
    x, y = np.array([row.confidence for row in rows]), np.array([row.accuracy for row in rows])
    below = np.maximum(y - [row.accuracy_low for row in rows], 0)  # rounding leaves −1e-17
    above = np.maximum([row.accuracy_high for row in rows] - y, 0)
    ax.vlines(x, x, y, color=VERMILLION, alpha=0.4, linewidth=6, label="gap: confidence to accuracy")
    ax.errorbar(
        x,
        y,
        [below, above],
        fmt="o",
        color=BLUE,
        elinewidth=1.2,
        capsize=3,
        label=f"accuracy, {percent(level)} Wilson interval",
    )


def _bin_counts(table: list[ReliabilityBin], ax: Axes) -> None:
    """Write each bin's number of documents into a strip below 0."""
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1]
    if len(table) > _NUMBERED_BINS:
        ax.set(ylim=(-0.02, 1.03), yticks=ticks)
        return
    digits = max(len(str(row.n)) for row in table)
    upright = digits * len(table) > _CHARACTERS
    strip = 0.03 + (0.03 * digits if upright else 0.08)
    ax.set(
        ylim=(-strip, 1.03),
        yticks=[-strip / 2, *ticks],
        yticklabels=["n", *(f"{tick:.1f}" for tick in ticks)],
    )
    ax.axhspan(-strip, 0, color=GREY, alpha=0.12, linewidth=0)
    for row in table:
        if row.n:
            middle = (row.lower + row.upper) / 2
            ax.text(
                middle, -strip / 2, str(row.n), ha="center", va="center", fontsize=8, rotation=90 * upright
            )


@styled
def plot_confidence_histogram(
    predictions: Predictions,
    *,
    bins: int = DEFAULT_BINS,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many answers of each confidence are right, and stacked on these how many are wrong.

    The distance between the lines of mean confidence and accuracy is the confidence gap.

    Args:
        predictions: with gold answers.
        bins: of equal width, those of the reliability diagram.
        title: of the figure.
        ax: where to draw; a new figure if left out.

    Raises:
        EnsembleError: unknown gold answers, ``bins`` < 1.

    Example:
        >>> from lm_eval_lora_ensemble import figures, metrics
        >>> predictions = metrics.Predictions.from_scores([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], gold=[0, 0, 0])
        >>> ax = figures.plot_confidence_histogram(predictions)
        >>> [bars.get_label() for bars in ax.containers]
        ['right (2)', 'wrong (1)']
    """
    confidence, correct = predictions.confidence, predictions.correct
    edges = bin_edges(confidence, bins)
    table = reliability_table(confidence, correct, bins)
    total = np.array([row.n for row in table])
    right = np.rint([row.n * row.accuracy if row.n else 0 for row in table])
    ax = axes_or_new(ax)
    bars: dict[str, Any] = {"align": "edge", "edgecolor": "white", "linewidth": 0.6}
    ax.bar(edges[:-1], right, np.diff(edges), color=BLUE, label=f"right ({int(right.sum())})", **bars)
    ax.bar(
        edges[:-1],
        total - right,
        np.diff(edges),
        bottom=right,
        color=ORANGE,
        hatch="////",
        label=f"wrong ({int((total - right).sum())})",
        **bars,
    )
    accuracy, mean = float(correct.mean()), float(confidence.mean())
    ax.axvline(accuracy, color=BLACK, clip_on=False, label=f"accuracy {accuracy:.3f}")
    ax.axvline(mean, color=BLACK, linestyle=(0, (4, 2)), clip_on=False, label=f"mean confidence {mean:.3f}")
    ax.set(xlim=(0, 1), xlabel="confidence max p̄ (probability)", ylabel="documents (count)")
    ax.set_ylim(0, 1.05 * total.max())
    caption(ax, title, f"{documents(predictions.n_documents)}, {bins} bins of equal width")
    legend_below(ax)
    return ax
