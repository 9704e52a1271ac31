"""The figures of a report: each a function from results to matplotlib Axes, saved with :func:`save`.

They need the extra ``report``, and neither torch nor lm-eval nor pyplot's global state. Every number that is
drawn comes from :mod:`lm_eval_lora_ensemble.metrics`.
"""

from __future__ import annotations

from lm_eval_lora_ensemble.figures.answers import plot_risk_coverage_by_score
from lm_eval_lora_ensemble.figures.curves import Curve, plot_curves
from lm_eval_lora_ensemble.figures.detection import plot_detection
from lm_eval_lora_ensemble.figures.information import plot_information_map, plot_uncertainty_histograms
from lm_eval_lora_ensemble.figures.reliability import plot_confidence_histogram, plot_reliability
from lm_eval_lora_ensemble.figures.selection import plot_risk_coverage
from lm_eval_lora_ensemble.figures.size import plot_by_size
from lm_eval_lora_ensemble.figures.style import save

__all__ = [
    "Curve",
    "plot_by_size",
    "plot_confidence_histogram",
    "plot_curves",
    "plot_detection",
    "plot_information_map",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_risk_coverage_by_score",
    "plot_uncertainty_histograms",
    "save",
]
