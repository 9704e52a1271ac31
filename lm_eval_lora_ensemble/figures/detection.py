"""How well each uncertainty score tells tasks of another domain from those of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.figures.style import (
    BLACK,
    axes_or_new,
    caption,
    legend_below,
    look,
    styled,
)
from lm_eval_lora_ensemble.figures.text import legend_name, percent, task_name
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate
from lm_eval_lora_ensemble.metrics.detection import Detection

_SPACING = 0.18
"""From one score's row to the next, where tasks are 1 apart."""

_LABELS = 75
"""Points of width that the tasks' names take."""


@styled
def plot_detection(
    rows: Mapping[str, Mapping[str, Detection]],
    *,
    level: float = 0.95,
    note: str = "",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw AUROC with its interval for each out-of-domain task and score.

    Args:
        rows: by out-of-domain task and score, as :func:`~lm_eval_lora_ensemble.metrics.detection.detect`
            returns it for each task. Drawn from the top.
        level: of the intervals, for the note.
        note: what else a reader has to know, such as the in-domain task and the number of documents.
        title: of the figure.
        ax: where to draw; a new figure if left out.

    Raises:
        EnsembleError: no task, or none with a score.

    Example:
        >>> from lm_eval_lora_ensemble import figures, metrics
        >>> sure = metrics.Predictions.from_scores([[9.0, 0.0], [0.0, 8.0]], gold=None)
        >>> unsure = metrics.Predictions.from_scores([[0.0, 0.1], [0.2, 0.0]], gold=None)
        >>> ax = figures.plot_detection({"other task": metrics.detect(sure, unsure, resamples=50)})
        >>> [line.get_label() for line in ax.get_lines()]
        ['chance, 0.5', 'max probability', 'entropy', 'expected entropy']
    """
    scores = list(dict.fromkeys(score for by_score in rows.values() for score in by_score))
    if not scores:
        raise EnsembleError("there is no out-of-domain task to draw; name some with --ood")
    ax = axes_or_new(ax, height=2.2 + 0.75 * len(rows))
    ax.axvline(0.5, color=BLACK, linestyle=(0, (4, 2)), linewidth=1.2, label="chance, 0.5")
    for index, score in enumerate(scores):
        dots = [(place, by_score[score]) for place, by_score in enumerate(rows.values()) if score in by_score]
        offset = (index - (len(scores) - 1) / 2) * _SPACING
        _dots(
            ax,
            [place + offset for place, _ in dots],
            [d.auroc for _, d in dots],
            index,
            legend_name(score.replace("_", " ")),
        )
    low, high = ax.get_xlim()
    ax.set(xlim=(max(0, min(low, 0.4)), min(1.02, max(high, 0.6))), ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), [task_name(name) for name in rows])
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("AUROC (out-of-domain above in-domain)")
    explained = f"bars: {percent(level)} interval over resampled documents"
    caption(ax, title, f"{note}; {explained}" if note else explained, taken=_LABELS)
    legend_below(ax)
    return ax


def _dots(ax: Axes, places: Sequence[float], estimates: Sequence[Estimate], index: int, label: str) -> None:
    chosen = look(index)
    limits = np.array([estimate.quoted[:2] for estimate in estimates])
    ax.hlines(places, limits[:, 0], limits[:, 1], color=chosen.colour, linewidth=1.4)
    ax.plot(
        [estimate.value for estimate in estimates],
        places,
        chosen.marker,
        color=chosen.colour,
        markersize=6,
        label=label,
    )
