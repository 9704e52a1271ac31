"""Is the ensemble large enough? A metric as members are added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.figures.style import BLUE, GREY, axes_or_new, caption, styled
from lm_eval_lora_ensemble.figures.text import metric_label
from lm_eval_lora_ensemble.metrics.ensemble_size import SizeMetrics

_TICKS = 10
"""Most sizes that are labelled; of more, every second, third, … is."""


@styled
def plot_by_size(
    rows: Sequence[SizeMetrics], *, metric: str, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw a metric's mean and standard deviation over ensembles of k = 1 … N members.

    Args:
        rows: from :func:`~lm_eval_lora_ensemble.metrics.ensemble_size.by_size`.
        metric: one of :data:`~lm_eval_lora_ensemble.metrics.registry.METRICS` that the rows hold.
        title: of the figure.
        ax: where to draw; a new figure if left out.

    Raises:
        EnsembleError: no rows, or no such metric.
        KeyError: a metric that the rows do not hold.

    Example:
        >>> from lm_eval_lora_ensemble import figures, metrics
        >>> predictions = metrics.Predictions.from_scores([[[2.0, 0.0]], [[0.0, 1.0]]], gold=[0])
        >>> ax = figures.plot_by_size(metrics.by_size(predictions), metric="nll")
        >>> ax.get_ylabel(), ax.get_xticks().tolist()
        ('nll (nats, lower is better)', [1, 2])
    """
    if not rows:
        raise EnsembleError("there is no ensemble size to draw; give the rows of by_size")
    label = metric_label(metric)
    size = np.array([row.members for row in rows])
    mean = np.array([row.mean[metric] for row in rows])
    spread = np.array([row.spread[metric] for row in rows])
    ax = axes_or_new(ax)
    ax.axhline(mean[-1], color=GREY, linestyle=(0, (1, 1.5)), linewidth=1.2)
    ax.errorbar(size, mean, spread, fmt="o-", color=BLUE, capsize=4, elinewidth=1.2)
    shown = rows[:: -(-len(rows) // _TICKS)]
    ax.set_xticks([row.members for row in shown], [f"{row.members}\n({row.subsets})" for row in shown])
    ax.set(xlim=(size[0] - 0.5, size[-1] + 0.5), ylabel=label)
    ax.set_xlabel("members k (in brackets: subsets measured, n)")
    caption(ax, title, _note(rows))
    return ax


def _note(rows: Sequence[SizeMetrics]) -> str:
    most = rows[-1].members
    if most == 1:
        return "one member: there is no larger ensemble to measure"
    subsets = "all subsets" if all(row.exhaustive for row in rows) else "random subsets where there are many"
    return (
        f"mean ± standard deviation over {subsets} of k of the {most} members; subsets share members, so "
        f"towards k = {most} the spread understates that of new training runs; dotted: all members"
    )
