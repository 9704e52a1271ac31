"""The figure of docs/posteriors.md: what each method gains in nll over one adapter, a panel a task."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stepwise.study import save_svg

from lm_eval_lora_ensemble.figures.style import BLACK, look, styled
from posterior_study.methods import POINT
from posterior_study.results import PRIMARY, Study

NAME = "study/posteriors-nll.svg"
"""Its place beside the page."""

METRIC = "nll"


def tasks_drawn(study: Study) -> list[str]:
    """Return the tasks that have something to draw: MAP and another method."""
    members = study.sizes.members[0]
    having = {
        task: [name for name in study.methods if study.done(members, name, task)]
        for task in study.sizes.documents
    }
    return [task for task, names in having.items() if POINT in names and len(names) > 1]


def draw(study: Study, folder: Path) -> None:
    """Write the figure of the first number of members below ``folder``, if there is something to draw."""
    tasks = tasks_drawn(study)
    if not tasks:
        return
    save_svg(_figure(study, study.sizes.members[0], tasks), folder / NAME)


@styled
def _figure(study: Study, members: int, tasks: list[str]) -> Figure:
    figure = Figure(figsize=(3.2 * len(tasks), 0.6 + 0.3 * len(study.methods)), layout="constrained")
    for index, task in enumerate(tasks):
        panel = figure.add_subplot(1, len(tasks), index + 1)
        _panel(panel, study, members, task)
        if index:
            panel.set_yticklabels([])
    return figure


def _panel(panel: Axes, study: Study, members: int, task: str) -> None:
    """Draw each method's paired difference to MAP, the first method on top."""
    judged = study.judge(members, task, PRIMARY)
    names = [name for name in study.methods if name != POINT]
    panel.axvline(0, color=BLACK, linestyle=(0, (4, 2)), linewidth=1.2)
    for place, name in enumerate(names):
        gain = judged[name].minus(judged[POINT]) if name in judged and POINT in judged else None
        if gain is None:
            continue
        value, chosen = gain.value(METRIC), look(0)
        if not math.isnan(value.low):
            panel.hlines(place, value.low, value.high, color=chosen.colour, linewidth=1.4)
        filled = chosen.colour if value.excludes_zero else "white"
        panel.plot(
            value.value,
            place,
            chosen.marker,
            color=chosen.colour,
            markerfacecolor=filled,
            markersize=6,
        )
    panel.set_yticks(range(len(names)), names)
    panel.set(ylim=(len(names) - 0.5, -0.5), xlabel=f"{METRIC} minus map, nats")
    panel.grid(visible=False, axis="y")
    panel.set_title(f"{task}, {study.sizes.documents[task]}", loc="left")
