"""How figures look, and how they are saved: the same bytes for the same numbers.

Whatever is told apart by colour (Okabe & Ito 2008, safe for colour-blind readers) is told apart by marker,
dash or hatch as well, so that a print in black and white can be read. Sizes are for 480 pixels of width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lm_eval_lora_ensemble.figures.text import wrapped

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#595959"
"""Okabe and Ito's colours but for the yellow, which is lost on white; grey is for notes and reference lines."""

BAND = 0.2
"""Opacity of an interval's band: two may lie over each other and the lines above both."""

MANY_POINTS = 600
"""A scatter of more points is stored as an image in the SVG: a hundred bytes a point add up."""

_WIDTH = 6.0
_SVG_DPI = 72
"""Of scatters stored as images: 160 kB for 15,000 documents, and as sharp as 480 pixels of width need."""

_LEGEND_DROP = 40
"""Points from the axes to the legend below: tick labels and the axis' label lie between."""

_RC: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.formatter.limits": [-9, 9],  # no "1e-4" above the axis, where the note is
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure is the same on every machine
    "font.size": 9,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "path.simplify": True,
    "savefig.dpi": 160,
    "svg.fonttype": "path",
    "svg.hashsalt": "lora-ensemble",  # without it the ids are random
    "text.parse_math": False,  # a task's name may hold dollar signs
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run ``draw`` under this module's settings and leave matplotlib's as they were."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(_RC):
            return draw(*args, **kwargs)

    return wrapper


@dataclass(frozen=True)
class Look:
    """What tells one series from the others, in colour and without."""

    colour: str
    marker: str
    dashes: Any


_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))


def look(index: int) -> Look:
    """Return the look of series ``index``; the cycles' lengths share no factor, so 210 series differ."""
    return Look(
        _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)], _DASHES[index % len(_DASHES)]
    )


def axes_or_new(ax: Axes | None, height: float = 4.4) -> Axes:
    """Return ``ax``, or the Axes of a new figure of its own with this height in inches."""
    if ax is not None:
        return ax
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _width(ax: Axes) -> float:
    """Return the width of the Axes in points, before the layout makes them wider."""
    return float(ax.bbox.width / ax.figure.dpi * 72)


def caption(ax: Axes, title: str | None, note: str, *, taken: float = 0) -> None:
    """Put the title and, smaller below it, what a reader has to know, above the Axes and inside their width.

    ``taken`` are the points of width that long tick labels will take from the Axes.
    """
    width = _width(ax) - taken
    below = wrapped(note, int(width / 4.7))
    ax.annotate(
        below,
        (0, 1),
        xytext=(0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        va="bottom",
        color=GREY,
        fontsize=8.5,
        linespacing=1.15,
    )
    if title:
        height = 11 * (below.count("\n") + 1)
        ax.set_title(wrapped(title, int(width / 6.8)), loc="left", pad=height + 8)


def legend_below(ax: Axes, *, opaque: bool = False) -> None:
    """Put the legend under the Axes, where it can hide nothing, in as many columns as fit.

    ``opaque`` shows its marks in full colour, for points that are faint only because they are many.
    """
    from matplotlib.transforms import ScaledTranslation

    labels = ax.get_legend_handles_labels()[1]
    if not labels:  # curves need no names
        return
    longest = max(len(line) for label in labels for line in label.split("\n"))
    down = ScaledTranslation(0, -_LEGEND_DROP / 72, ax.figure.dpi_scale_trans)
    legend = ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=ax.transAxes + down,
        ncols=max(1, min(len(labels), int(_width(ax) / (5 * longest + 40)))),
        borderaxespad=0,
        columnspacing=1.5,
        handlelength=2.8,
    )
    for handle in filter(None, legend.legend_handles if opaque else []):
        handle.set_alpha(1)


def say_instead(ax: Axes, text: str) -> None:
    """Write in the middle of the Axes why nothing is drawn there."""
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=11, color=GREY)


@styled
def save(drawn: Axes | Figure, path: Path | str) -> tuple[Path, Path]:
    """Write ``path`` + ``.svg`` and ``path`` + ``.png``.

    The files hold no date and no version: equal numbers and one release of matplotlib give equal bytes.

    Args:
        drawn: a figure, or any Axes of it.
        path: without suffix, or with one of these two; another dot in the name is part of the name.

    Returns:
        The two files.

    Raises:
        OSError: they cannot be written.

    Example:
        >>> from lm_eval_lora_ensemble import figures, metrics
        >>> from pathlib import Path
        >>> predictions = metrics.Predictions.from_scores([[2.0, 0.0], [0.0, 1.0]], gold=[0, 0])
        >>> files = figures.save(figures.plot_reliability(predictions), Path("reliability"))
        >>> [file.name for file in files]
        ['reliability.svg', 'reliability.png']
    """
    figure = drawn if isinstance(drawn, Figure) else drawn.figure.canvas.figure  # of a subfigure: the whole
    place = Path(path)
    stem = place.name.removesuffix(".svg").removesuffix(".png")
    svg, png = place.with_name(f"{stem}.svg"), place.with_name(f"{stem}.png")
    figure.savefig(svg, format="svg", dpi=_SVG_DPI, metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", metadata={"Software": None})
    return svg, png
