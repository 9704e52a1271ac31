"""Calibration errors: does confidence match the share of right answers?"""

from __future__ import annotations

from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.battery import WeightedDocuments
from lm_eval_lora_ensemble.metrics.classwise import classwise_l1
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import metric


@metric(
    family="calibration",
    direction="lower",
    range="0–1",
    in_table=True,
    column="ece",
    definition="Σ_b (n_b/n) |acc_b − conf_b|, equal widths",
    source="[6], [7]",
)
def ece(documents: WeightedDocuments) -> FloatArray:
    """(R,): expected calibration error."""
    return documents.bins.l1()


@metric(
    family="calibration",
    direction="lower",
    range="0–1",
    definition="Σ_b (n_b/n) |acc_b − conf_b|, bins at the sample's quantiles; equal confidences stay together",
    source="Nixon 2019",
)
def ece_equal_mass(documents: WeightedDocuments) -> FloatArray:
    """(R,): expected calibration error over bins of equally many documents."""
    return documents.equal_mass_bins.l1()


@metric(
    family="calibration",
    direction="lower",
    range="0–1",
    in_table=True,
    definition="√(Σ_b (n_b/n)(acc_b − conf_b)²)",
    source="Hendrycks 2019",
)
def rms_ce(documents: WeightedDocuments) -> FloatArray:
    """(R,): root-mean-square calibration error."""
    return documents.bins.l2()


@metric(
    family="calibration",
    direction="lower",
    range="0–1",
    definition="max_b |acc_b − conf_b| over bins with documents",
    source="[6]",
)
def mce(documents: WeightedDocuments) -> FloatArray:
    """(R,): maximum calibration error."""
    return documents.bins.largest()


@metric(
    family="calibration",
    direction="lower",
    range="−¼–1",
    definition="Σ_b (n_b/n)[(acc_b − conf_b)² − acc_b(1 − acc_b)/(n_b − 1)]",
    source="[5], [8]",
)
def squared_ce_debiased(documents: WeightedDocuments) -> FloatArray:
    """(R,): squared calibration error less what chance alone puts into it."""
    return documents.bins.squared_debiased()


@metric(
    family="calibration",
    direction="lower",
    range="0–1",
    definition="ECE of each choice position's probability, averaged over positions",
    source="Kull 2019",
)
def classwise_ece(documents: WeightedDocuments) -> FloatArray:
    """(R,): mean calibration error of the choice positions."""
    return classwise_l1(documents.classes)


@metric(
    per_document=True,
    needs_gold=False,
    family="calibration",
    direction="",
    range="0–1",
    definition="mean confidence",
)
def confidence(predictions: Predictions) -> FloatArray:
    """(D,): max p̄."""
    return predictions.confidence


@metric(
    family="calibration",
    direction="",
    range="−1–1",
    definition="mean confidence − accuracy; > 0 is over-confident, 0 is best",
)
def confidence_gap(documents: WeightedDocuments) -> FloatArray:
    """(R,): signed, and never larger in size than ECE."""
    return documents["confidence"] - documents["accuracy"]
