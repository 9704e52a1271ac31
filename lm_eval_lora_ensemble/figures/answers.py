"""Which score of a generated answer tells best which answers to withhold?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from lm_eval_lora_ensemble.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    axes_or_new,
    caption,
    legend_below,
    styled,
)
from lm_eval_lora_ensemble.figures.text import documents as count

_COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, BLACK)
_DASHES = ((0, ()), (0, (5, 2)), (0, (1, 1.2)), (0, (3, 1, 1, 1)), (0, (8, 2)), (0, (2, 2)))


@styled
def plot_risk_coverage_by_score(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    documents: int,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the error rate among the most certain answers against their share, a line for each score.

    Args:
        curves: (coverage, risk) pairs by score, coverages ascending to 1.
        documents: D.
        title: of the figure.
        ax: where to draw; a new figure if left out.

    Example:
        >>> from lm_eval_lora_ensemble import figures
        >>> ax = figures.plot_risk_coverage_by_score({"answer_nll": [(0.5, 0.0), (1.0, 0.5)]}, documents=2)
        >>> [line.get_label() for line in ax.get_lines()]
        ['answer_nll', 'random']
    """
    ax = axes_or_new(ax)
    styles = zip(curves.items(), _COLORS, _DASHES, strict=False)
    for (score, curve), color, dashes in styles:
        coverage, risk = zip(*curve, strict=True)
        ax.plot(coverage, risk, color=color, linestyle=dashes, label=score)
    rate = max(curve[-1][1] for curve in curves.values())
    ax.axhline(rate, color=GREY, linestyle=(0, (6, 2, 1, 2)), linewidth=1.2, label="random")
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    ax.set(xlabel="coverage (share of documents answered)", ylabel="risk (error rate among them)")
    caption(ax, title, f"{count(documents)}; lower is better")
    legend_below(ax)
    return ax
