"""Words in figures: names of metrics with their units, names of tasks that may be long or hostile."""

from __future__ import annotations

import textwrap

from lm_eval_lora_ensemble.errors import EnsembleError, one_line
from lm_eval_lora_ensemble.metrics.registry import METRICS

ENTROPY_LABELS = {
    "predictive_entropy": "predictive entropy H (nats)",
    "mutual_information": "mutual information MI (nats)",
}
_BETTER = {"higher": "higher is better", "lower": "lower is better"}


def wrapped(text: str, width: int) -> str:
    """Return ``text`` broken into lines of at most ``width``, control characters escaped."""
    return "\n".join(textwrap.wrap(one_line(text), max(width, 12)))


def task_name(name: str, width: int = 24) -> str:
    """Return a task's name in lines of at most ``width``, broken after underscores where there are some."""
    lines = [""]
    for part in one_line(name).replace("_", "_\0").split("\0"):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(wrapped(line, width) for line in lines)


def legend_name(name: str) -> str:
    """Return a name for the legend, where matplotlib leaves out what begins with an underscore."""
    shown = task_name(name, 60)
    return f" {shown}" if shown.startswith("_") else shown


def percent(level: float) -> str:
    """Return a coverage as in "95 %"."""
    return f"{100 * level:g} %"


def documents(n: int) -> str:
    """Return "n = 1 document", "n = 570 documents"."""
    return f"n = {n} document{'s' * (n != 1)}"


def metric_label(name: str) -> str:
    """Return an axis label for a metric: its name, its unit if it has one, and which way is better.

    Raises:
        EnsembleError: there is no such metric.
    """
    if name not in METRICS:
        raise EnsembleError(f"there is no metric {one_line(name)!r}; choose one of {', '.join(METRICS)}")
    metric = METRICS[name]
    details = [part for part in (metric.unit, _BETTER.get(metric.direction, "")) if part]
    words = name.replace("_", " ")
    return f"{words} ({', '.join(details)})" if details else words
