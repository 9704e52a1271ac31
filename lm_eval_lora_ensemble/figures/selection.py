"""How much better are the answers if the least confident ones are withheld?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lm_eval_lora_ensemble.figures.style import (
    BAND,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    VERMILLION,
    axes_or_new,
    caption,
    legend_below,
    styled,
)
from lm_eval_lora_ensemble.figures.text import documents, percent
from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray
from lm_eval_lora_ensemble.metrics.bootstrap import ResamplingPlan
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.ranking import Ranking
from lm_eval_lora_ensemble.metrics.selection import RiskCoverage, risk_coverage

_POINTS = 250
"""Coverages drawn: as fine as a figure shows, whatever the number of documents."""

_SETTLED = 0.05
"""Coverage from which on the curves set the axis' reach: before it a single document can be the whole risk."""


@styled
def plot_risk_coverage(
    predictions: Predictions,
    *,
    resamples: int = 200,
    seed: int = 0,
    level: float = 0.95,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the error rate among the most confident answers against their share (Geifman & El-Yaniv 2017).

    The ensemble ranked by max p̄, with a pointwise percentile band over resampled documents (whole tasks
    where several are pooled); the mean over single members; the best possible ranking and none. Where
    confidences tie, the risk is its mean over all orders.

    Args:
        predictions: with gold answers.
        resamples: R of the band.
        seed: of the resampling.
        level: of the band.
        title: of the figure.
        ax: where to draw; a new figure if left out.

    Raises:
        EnsembleError: unknown gold answers, ``resamples`` < 2, ``level`` outside (0, 1).

    Example:
        >>> from lm_eval_lora_ensemble import figures, metrics
        >>> predictions = metrics.Predictions.from_scores([[2.0, 0.0], [0.0, 1.0]], gold=[0, 0])
        >>> ax = figures.plot_risk_coverage(predictions)
        >>> [line.get_label() for line in ax.get_lines()][:3]
        ['one member, AURC 0.250', 'oracle, AURC 0.250', 'random, AURC 0.500']
    """
    error = ~predictions.correct
    d, rate = predictions.n_documents, float(error.mean())
    grid = np.unique(np.ceil(np.linspace(1 / d, 1, min(d, _POINTS)) * d - 1e-9)) / d
    ax = axes_or_new(ax)
    low, high = _band(predictions, grid, resamples, seed, level)
    name = "ensemble" if predictions.n_members > 1 else "one member"
    between = f"{percent(level)} interval, {name}"
    ax.fill_between(grid, low, high, color=BLUE, alpha=BAND, linewidth=0, label=between)
    curves = [_draw(ax, grid, [_curve(predictions)], name, color=BLUE), high]
    if predictions.n_members > 1:
        members = [_curve(predictions.member(m)) for m in range(predictions.n_members)]
        curves.append(_draw(ax, grid, members, "mean single member", color=VERMILLION, linestyle=(0, (5, 2))))
    _draw(ax, grid, [risk_coverage(error, error)], "oracle", color=GREEN, linestyle=(0, (1, 1.2)))
    ax.axhline(rate, color=GREY, linestyle=(0, (6, 2, 1, 2)), linewidth=1.2, label=_label("random", rate))
    ax.plot([1], [rate], "o", color=BLACK, clip_on=False)
    reach = max(rate, *(float(risk[grid >= _SETTLED].max()) for risk in curves))
    ax.set(xlim=(0, 1), ylim=(0, min(1.02, 1.1 * reach) or 0.05))
    ax.set(xlabel="coverage (share of documents answered)", ylabel="risk (error rate among them)")
    drawn_by = "documents" if predictions.clusters is None else "tasks"
    caption(
        ax,
        title,
        f"{documents(d)}, ranked by max p̄; AURC: area under the curve, lower is better; "
        f"band from {resamples} resamples of {drawn_by}",
    )
    legend_below(ax)
    return ax


def _draw(ax: Axes, grid: FloatArray, curves: Sequence[RiskCoverage], name: str, **style: Any) -> FloatArray:
    """Draw the mean of some curves, their mean area in the legend; return the mean risk at each coverage."""
    risk: FloatArray = np.mean([_risk_at(grid, curve) for curve in curves], axis=0)
    ax.plot(grid, risk, label=_label(name, float(np.mean([curve.aurc for curve in curves]))), **style)
    return risk


def _label(name: str, area: float) -> str:
    return f"{name}, AURC {area:.3f}"


def _curve(predictions: Predictions) -> RiskCoverage:
    return risk_coverage(predictions.least_confidence, ~predictions.correct)


def _risk_at(coverage: FloatArray, curve: RiskCoverage) -> FloatArray:
    """Return a curve's risk at other coverages: among equals, errors rise in proportion to documents."""
    return _interpolated(coverage, curve.coverage, curve.coverage * curve.risk)


def _interpolated(coverage: FloatArray, accepted: FloatArray, errors: FloatArray) -> FloatArray:
    risk: FloatArray = np.interp(coverage, np.append(0, accepted), np.append(0, errors)) / coverage
    return risk


def _band(
    predictions: Predictions, coverage: FloatArray, resamples: int, seed: int, level: float
) -> tuple[FloatArray, FloatArray]:
    """Return the lower and upper limit of the risk at each coverage."""
    error: BoolArray = ~predictions.correct
    ranking = Ranking(predictions.least_confidence, error)
    plan = ResamplingPlan(
        predictions.n_documents, resamples, seed, clusters=predictions.clusters, level=level
    )
    risks = []
    for weights in plan.draws():
        runs = ranking.runs(weights)
        accepted, errors = runs.weight_up_to / runs.total, runs.positive_up_to / runs.total
        risks += [_interpolated(coverage, a, e) for a, e in zip(accepted, errors, strict=True)]
    low, high = np.quantile(risks, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
