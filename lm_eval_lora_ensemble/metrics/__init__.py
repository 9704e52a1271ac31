"""Uncertainty metrics: pure functions of arrays that know neither model nor task.

What is imported here is public. Each function's docstring has its definition, shapes, range and errors;
docs/metrics.md has the table of the metrics that every analysis reports, :data:`METRICS` the same as data.

Example:
    >>> from lm_eval_lora_ensemble import metrics
    >>> round(metrics.expected_calibration_error([0.9, 0.6], [True, False]), 3)
    0.35
    >>> metrics.METRICS["ece"].direction
    'lower'
"""

from __future__ import annotations

from lm_eval_lora_ensemble.metrics.battery import Battery, WeightedDocuments, uncertainty_scores
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate, ResamplingPlan
from lm_eval_lora_ensemble.metrics.calibration import (
    confidence_gap,
    debiased_squared_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_table,
    rms_calibration_error,
)
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores
from lm_eval_lora_ensemble.metrics.choices import (
    choice_probabilities,
    ensemble_probabilities,
    log_choice_probabilities,
    with_other_class,
)
from lm_eval_lora_ensemble.metrics.classwise import brier_decomposition, classwise_calibration_error
from lm_eval_lora_ensemble.metrics.conformal import conformal_sets
from lm_eval_lora_ensemble.metrics.detection import detect
from lm_eval_lora_ensemble.metrics.disagreement import (
    agreement,
    kl_divergence,
    pairwise_agreement,
    pairwise_kl,
    pairwise_total_variation,
    total_variation,
    variation_ratio,
)
from lm_eval_lora_ensemble.metrics.ensemble_size import by_size
from lm_eval_lora_ensemble.metrics.information import (
    entropy,
    expected_entropy,
    mutual_information,
    predictive_entropy,
)
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.proper_scores import brier_score, negative_loglikelihood
from lm_eval_lora_ensemble.metrics.ranking import auroc, average_precision, false_positive_rate_at
from lm_eval_lora_ensemble.metrics.recalibration import (
    fit_shared_temperature,
    fit_temperature,
    fit_vector,
    recalibrate,
)
from lm_eval_lora_ensemble.metrics.registry import METRICS, metric
from lm_eval_lora_ensemble.metrics.selection import accuracy_at_coverage, coverage_at_risk, risk_coverage

__all__ = [
    "METRICS",
    "Battery",
    "ChoiceScores",
    "Estimate",
    "Predictions",
    "ResamplingPlan",
    "WeightedDocuments",
    "accuracy_at_coverage",
    "agreement",
    "auroc",
    "average_precision",
    "brier_decomposition",
    "brier_score",
    "by_size",
    "choice_probabilities",
    "classwise_calibration_error",
    "confidence_gap",
    "conformal_sets",
    "coverage_at_risk",
    "debiased_squared_calibration_error",
    "detect",
    "ensemble_probabilities",
    "entropy",
    "expected_calibration_error",
    "expected_entropy",
    "false_positive_rate_at",
    "fit_shared_temperature",
    "fit_temperature",
    "fit_vector",
    "kl_divergence",
    "log_choice_probabilities",
    "maximum_calibration_error",
    "metric",
    "mutual_information",
    "negative_loglikelihood",
    "pairwise_agreement",
    "pairwise_kl",
    "pairwise_total_variation",
    "predictive_entropy",
    "recalibrate",
    "reliability_table",
    "risk_coverage",
    "rms_calibration_error",
    "total_variation",
    "uncertainty_scores",
    "variation_ratio",
    "with_other_class",
]
