"""Accuracy and proper scores: what the ensemble's distribution is worth when the gold answer is known."""

from __future__ import annotations

import numpy as np

from lm_eval_lora_ensemble.metrics import proper_scores
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.battery import WeightedDocuments
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import metric


@metric(
    per_document=True,
    family="calibration",
    direction="higher",
    range="0–1",
    column="acc",
    definition="share of correct answers",
)
def accuracy(predictions: Predictions) -> FloatArray:
    """(D,): 1 where argmax p̄ is gold."""
    return predictions.correct.astype(np.float64)


@metric(
    per_document=True,
    family="calibration",
    direction="lower",
    unit="nats",
    range="0–∞",
    in_table=True,
    column="nll",
    definition="mean of −log P_G, nats; P_G is the mass of p̄ on the gold choices",
    source="Good 1952",
)
def nll(predictions: Predictions) -> FloatArray:
    """(D,): from log p̄ and not from p̄, which a long continuation can underflow."""
    # adding 0 turns the −0 of a certain answer into 0; rounding may leave a mass of 1 + 1e-16
    loss: FloatArray = -np.minimum(predictions.log_gold_mass, 0.0) + 0.0
    return loss


@metric(
    per_document=True,
    family="calibration",
    direction="lower",
    range="0–2",
    in_table=True,
    column="brier",
    definition="mean of (1 − P_G)² + Σ_{c ∉ G} p̄(c)²; Σ_c (p̄(c) − 1[c = gold])² for one gold choice",
    source="Brier 1950",
)
def brier_score(predictions: Predictions) -> FloatArray:
    """(D,): the quadratic score."""
    return proper_scores.brier_score(predictions.mixture, predictions.require_gold())


@metric(
    family="calibration",
    direction="lower",
    range="0–2",
    definition="Σ over choices and bins of (n_b/n)(p_b − o_b)²",
    source="[2], [3]",
)
def brier_reliability(documents: WeightedDocuments) -> FloatArray:
    """(R,): squared distance of probability and frequency."""
    return documents.brier_parts.reliability


@metric(
    family="calibration",
    direction="higher",
    range="0–1",
    definition="Σ over choices and bins of (n_b/n)(o_b − o)²",
    source="[2], [3]",
)
def brier_resolution(documents: WeightedDocuments) -> FloatArray:
    """(R,): squared distance of the bins' frequencies from the base rate."""
    return documents.brier_parts.resolution


@metric(
    family="calibration",
    direction="",
    range="0–1",
    definition="Σ over choices of o(1 − o)",
    source="[2], [3]",
)
def brier_uncertainty(documents: WeightedDocuments) -> FloatArray:
    """(R,): variance of the base rates, a property of the data."""
    return documents.brier_parts.uncertainty


@metric(
    family="calibration",
    direction="",
    range="",
    definition="what binning leaves: brier − (REL − RES + UNC)",
    source="[4]",
)
def brier_within_bin(documents: WeightedDocuments) -> FloatArray:
    """(R,): the remainder of the decomposition."""
    return documents.brier_parts.within_bin
