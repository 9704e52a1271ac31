"""The figure of docs/study.md: what overfitting does by epoch, and what tells other domains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stepwise.study import save_svg

from lm_eval_lora_ensemble.analysis.distribution import Distribution
from lm_eval_lora_ensemble.figures.style import BAND, BLACK, look, styled
from overfitting_study.claims import OUTSIDE
from overfitting_study.plan import EPOCHS, FOREIGN, IN_DOMAIN, PENALTIES
from overfitting_study.results import (
    OF_MEMBERS,
    PRIMARY,
    RAW_SUMS,
    Detected,
    Ensemble,
    MeanMember,
    Measure,
    Study,
    by_epoch,
    last,
)

NAME = "study/overfitting.svg"
"""Its place beside the page."""

PANELS = (
    ("nll, T from validation", "nll", PRIMARY, True),
    ("nll, summed, T = 1", "nll", RAW_SUMS, True),
    ("mutual information", OF_MEMBERS, PRIMARY, False),
)


def has_something(study: Study) -> bool:
    """Whether there is an epoch to draw."""
    of = by_epoch(PENALTIES[0], EPOCHS[0], IN_DOMAIN, study.sizes)
    return study.judge(Ensemble(of), PRIMARY) is not None


def draw(study: Study, folder: Path) -> None:
    """Write the figure below ``folder``, if there is something to draw."""
    if not has_something(study):
        return
    save_svg(_figure(study), folder / NAME)


@styled
def _figure(study: Study) -> Figure:
    figure = Figure(figsize=(12.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(PANELS) + 1, width_ratios=[1, 1, 1, 1.6])
    for panel, (title, metric, view, with_members) in zip(panels, PANELS, strict=False):
        for index, penalty in enumerate(PENALTIES):
            _course(panel, study, penalty, metric, view, 2 * index, whole=True)
            if with_members:
                _course(panel, study, penalty, metric, view, 2 * index + 1, whole=False)
        panel.set(xlabel="epoch", xticks=EPOCHS)
        panel.set_title(title, loc="left")
    _domains(panels[-1], study)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure


def _course(
    panel: Axes, study: Study, penalty: str, metric: str, view: Distribution, number: int, *, whole: bool
) -> None:
    epochs, values = [], []
    for epoch in EPOCHS:
        of = by_epoch(penalty, epoch, IN_DOMAIN, study.sizes)
        measure: Measure = Ensemble(of) if whole else MeanMember(of)
        judged = study.judge(measure, view)
        if judged is not None:
            epochs.append(epoch)
            values.append(judged.value(metric))
    if not values:
        return
    chosen = look(number)
    name = f"λ = {penalty}, {'ensemble' if whole else 'mean member'}"
    panel.plot(epochs, [v.value for v in values], color=chosen.colour, marker=chosen.marker, label=name)
    lows, highs = [v.low for v in values], [v.high for v in values]
    panel.fill_between(epochs, lows, highs, color=chosen.colour, alpha=BAND / 2, linewidth=0)


def _domains(panel: Axes, study: Study) -> None:
    tasks = [*OUTSIDE, *FOREIGN]
    for index, (score, name) in enumerate((("entropy", "entropy"), (OF_MEMBERS, "mutual information"))):
        chosen = look(index)
        for place, task in enumerate(tasks):
            judged = study.judge(Detected(last(PENALTIES[0], task, study.sizes)), PRIMARY)
            if judged is None or f"{score}/auroc" not in judged.metrics:
                continue
            value = judged.value(f"{score}/auroc")
            height = place + 0.3 * (index - 0.5)
            panel.hlines(height, 0.5 + value.low, 0.5 + value.high, color=chosen.colour, linewidth=1.4)
            label = name if not place else None
            filled = chosen.colour if value.excludes_zero else "white"
            panel.plot(
                0.5 + value.value,
                height,
                chosen.marker,
                color=chosen.colour,
                markerfacecolor=filled,
                label=label,
            )
    panel.axvline(0.5, color=BLACK, linestyle=(0, (4, 2)), linewidth=1.2)
    panel.set_yticks(np.arange(len(tasks)), [task.removesuffix("_continuation") for task in tasks])
    panel.set(ylim=(len(tasks) - 0.5, -0.5), xlabel=f"AUROC against {IN_DOMAIN}, λ = {PENALTIES[0]}")
    panel.grid(visible=False, axis="y")
    panel.set_title("other domains", loc="left")
