"""The table and the figure of docs/metrics.md on the scale of scores: ``python docs/study/scales.py RESULTS FIGURE``.

RESULTS is lm-eval's output folder of an ensemble with a temperature from validation, run with ``--log_samples`` on
hellaswag, arc_easy and arc_challenge. Prints Markdown; writes FIGURE (PNG).
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from lm_eval_lora_ensemble import figures, load_runs
from lm_eval_lora_ensemble.analysis.distribution import CROSSFIT, RAW, VALIDATION, Distribution
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.scales import METRICS_BY_SCALE, by_scale
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate

SHOWN = "hellaswag"
PANELS = (
    ("summed, T = 1", Distribution("sum", RAW)),
    ("per character, T: validation", Distribution("chars", VALIDATION)),
    ("per character, T: oracle", Distribution("chars", CROSSFIT)),
)


def interval(estimate: Estimate) -> str:
    """Show a value with its interval."""
    low, high, _ = estimate.quoted
    return f"{estimate.value:.3f} [{low:.3f}, {high:.3f}]"


def main(results: Path, figure: Path) -> None:
    """Print the table and draw the figure."""
    run = max(load_runs(results), key=lambda one: one.date)
    heads = ("task, documents", "scores", "acc", "nll", "ece", "mean member: acc, nll, ece")
    print("|".join(["", *heads, "nll, ensemble − member", "ece, ensemble − member", ""]))
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for task in run.tasks:
        for scale in by_scale(run, task, Settings()):
            values = [f"{scale.ensemble[m].value:.3f}" for m in METRICS_BY_SCALE]
            members = ", ".join(f"{scale.member_mean[m].value:.3f}" for m in METRICS_BY_SCALE)
            gains = [interval(scale.difference[m]) for m in ("nll", "ece")]
            name = f"{task}, {run.predictions(task).n_documents}"
            print("|".join(["", name, scale.label, *values, members, *gains, ""]))
    drawing = Figure(figsize=(15, 5.6))
    for panel, (title, distribution) in zip(drawing.subplots(1, len(PANELS)), PANELS, strict=True):
        figures.plot_reliability(run.under(distribution).predictions(SHOWN), title=title, ax=panel)
    drawing.savefig(figure, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
