"""What the members disagree about: mutual information against entropy, in-domain against out-of-domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from lm_eval_lora_ensemble.figures.style import (
    BLACK,
    BLUE,
    GREY,
    MANY_POINTS,
    VERMILLION,
    axes_or_new,
    caption,
    legend_below,
    look,
    say_instead,
    styled,
)
from lm_eval_lora_ensemble.figures.text import ENTROPY_LABELS, documents, legend_name
from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray
from lm_eval_lora_ensemble.metrics.battery import uncertainty_scores
from lm_eval_lora_ensemble.metrics.predictions import Predictions

Score = Literal["predictive_entropy", "mutual_information"]

_NAMES = {"predictive_entropy": "entropy", "mutual_information": "mutual_information"}
"""The scores' names in :func:`~lm_eval_lora_ensemble.metrics.battery.uncertainty_scores`."""

_ONE_MEMBER = "one member has no mutual information:\nit measures what several disagree about"

_HISTOGRAM_BINS = 30


@styled
def plot_information_map(
    predictions: Predictions, *, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw each document's mutual information against its predictive entropy, right and wrong apart.

    Along the horizontal axis the ensemble is unsure; upwards this is so because its members disagree. Mutual
    information is bounded by the entropy and by ln N, the entropy by ln C; bounds within reach are drawn,
    the others stated.

    Args:
        predictions: right and wrong are not told apart if the gold answers are unknown.
        title: of the figure.
        ax: where to draw; a new figure if left out.

    Returns:
        The Axes; for a single member they hold a sentence and no points.

    Example:
        >>> from lm_eval_lora_ensemble import figures, metrics
        >>> scores = [[[2.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [1.0, 0.5]]]
        >>> ax = figures.plot_information_map(metrics.Predictions.from_scores(scores, gold=[0, 0]))
        >>> [points.get_label() for points in ax.collections]
        ['right (1)', 'wrong (1)']
    """
    ax = axes_or_new(ax, height=5.0)
    ax.set(xlabel=ENTROPY_LABELS["predictive_entropy"], ylabel=ENTROPY_LABELS["mutual_information"])
    n, most = predictions.n_members, int(predictions.counts.max())
    sizes = f"{documents(predictions.n_documents)}, N = {n} member{'s' * (n != 1)}, {_choices(predictions)}"
    if n == 1:
        say_instead(ax, _ONE_MEMBER)
        caption(ax, title, sizes)
        return ax
    scores = uncertainty_scores(predictions)
    entropy, information = scores["entropy"], scores["mutual_information"]
    reach = 1.15 * (max(0.0, float(information.max())) or float(np.log(n)))
    ax.set(xlim=(0, 1.04 * np.log(most)), ylim=(-0.03 * reach, reach))
    _scatter(ax, entropy, information, _groups(predictions))
    beyond = _bounds(ax, n, most)
    caption(ax, title, f"{sizes}; a point a document{beyond}")
    legend_below(ax, opaque=True)
    return ax


def _choices(predictions: Predictions) -> str:
    fewest, most = int(predictions.counts.min()), int(predictions.counts.max())
    return f"C = {most} choices" if fewest == most else f"C = {fewest} to {most} choices"


def _groups(predictions: Predictions) -> list[tuple[str, str, str, BoolArray]]:
    """Return label, colour, marker and documents of each group to tell apart."""
    if predictions.is_gold is None:
        return [("gold answer unknown", BLUE, "o", np.ones(predictions.n_documents, dtype=bool))]
    right = predictions.correct
    return [("right", BLUE, "o", right), ("wrong", VERMILLION, "x", ~right)]


def _scatter(ax: Axes, x: FloatArray, y: FloatArray, groups: list[tuple[str, str, str, BoolArray]]) -> None:
    many = len(x) > MANY_POINTS
    for label, colour, marker, chosen in groups:
        cross = marker == "x"
        ax.scatter(
            x[chosen],
            y[chosen],
            s=(10 if cross else 7) if many else (22 if cross else 16),
            c=colour,
            marker=marker,
            linewidths=0.9 if cross else 0,
            alpha=0.3 if many else 0.75,
            rasterized=many,
            label=f"{label} ({int(chosen.sum())})",
        )


def _bounds(ax: Axes, members: int, choices: int) -> str:
    """Draw the bounds that the Axes reach, and return what to say about the one they may not."""
    top = ax.get_ylim()[1]
    limit = float(np.log(members))
    end = min(np.log(choices), top)
    ax.plot([0, end], [0, end], color=BLACK, linewidth=1.2, label="MI = H, no member unsure")
    ax.axvline(
        np.log(choices), color=GREY, linestyle=(0, (1, 1.2)), label=f"H = ln C = {np.log(choices):.2f}"
    )
    if limit > top:
        return f"; the bound MI = ln N = {limit:.2f} lies above the axis"
    ax.axhline(limit, color=GREY, linestyle=(0, (5, 2)), linewidth=1.2, label=f"MI = ln N = {limit:.2f}")
    return ""


@styled
def plot_uncertainty_histograms(
    in_domain: Predictions,
    out_of_domain: Mapping[str, Predictions],
    *,
    score: Score,
    in_domain_name: str,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how an uncertainty is distributed in-domain (filled) and on other tasks (outlines).

    Each outline adds up to 1, so that tasks of different sizes compare.

    Args:
        in_domain: the task the members were trained for.
        out_of_domain: by task name, scored by the same members; gold answers are not needed.
        score: ``predictive_entropy`` or ``mutual_information``.
        in_domain_name: of the task.
        title: of the figure.
        ax: where to draw; a new figure if left out.

    Returns:
        The Axes; for mutual information of a single member they hold a sentence instead.

    Example:
        >>> from lm_eval_lora_ensemble import figures, metrics
        >>> sure = metrics.Predictions.from_scores([[9.0, 0.0], [0.0, 8.0]], gold=None)
        >>> unsure = metrics.Predictions.from_scores([[0.0, 0.1]], gold=None)
        >>> ax = figures.plot_uncertainty_histograms(
        ...     sure, {"b": unsure}, score="predictive_entropy", in_domain_name="a"
        ... )
        >>> ax.get_legend_handles_labels()[1]
        ['a, in-domain (n = 2)', 'b, out-of-domain (n = 1)']
    """
    ax = axes_or_new(ax, height=4.2 + 0.2 * len(out_of_domain))
    ax.set(xlabel=ENTROPY_LABELS[score], ylabel="share of documents in the bin")
    parts = [in_domain, *out_of_domain.values()]
    if score == "mutual_information" and any(part.n_members == 1 for part in parts):
        say_instead(ax, _ONE_MEMBER)
        caption(ax, title, "one member")
        return ax
    # Rounding may leave mutual information a little below 0, where no bin is.
    values = [np.maximum(uncertainty_scores(part)[_NAMES[score]], 0) for part in parts]
    top = max(float(v.max()) for v in values) or 1.0
    edges = np.linspace(0, top, _HISTOGRAM_BINS + 1)
    for index, (name, v) in enumerate(zip([in_domain_name, *out_of_domain], values, strict=True)):
        role = "in-domain" if index == 0 else "out-of-domain"
        _outline(ax, edges, v, index, f"{legend_name(name)}, {role} (n = {len(v)})")
    ax.set(xlim=(0, 1.01 * top))
    ax.set_ylim(bottom=0)
    note = f"{_HISTOGRAM_BINS} bins of {top / _HISTOGRAM_BINS:.2g} nats; each outline adds up to 1"
    if len({count for part in parts for count in np.unique(part.counts)}) > 1:
        note += "; numbers of choices differ, and entropy rises with them"
    caption(ax, title, note)
    legend_below(ax)
    return ax


def _outline(ax: Axes, edges: FloatArray, values: FloatArray, index: int, label: str) -> None:
    shares = np.histogram(values, edges)[0] / len(values)
    chosen = look(index)
    if index == 0:
        ax.stairs(shares, edges, fill=True, color=chosen.colour, alpha=0.35, label=label)
        ax.stairs(shares, edges, color=chosen.colour, linewidth=1)
    else:
        ax.stairs(shares, edges, color=chosen.colour, linestyle=chosen.dashes, linewidth=1.8, label=label)
