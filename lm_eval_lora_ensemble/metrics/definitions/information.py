"""How uncertain the ensemble is, and what its members disagree about; none of it asks who is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lm_eval_lora_ensemble.metrics import disagreement, information
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import metric

_Function = TypeVar("_Function", bound=Callable[[Predictions], FloatArray])


def _information(**meaning: Any) -> Callable[[_Function], _Function]:
    """Register a mean over documents that needs no gold answer and is neither good nor bad."""
    return metric(per_document=True, needs_gold=False, family="information", direction="", **meaning)


@_information(
    unit="nats",
    range="0–ln C",
    in_table=True,
    column="entropy",
    definition="H[p̄] = −Σ_c p̄(c) log p̄(c), total uncertainty",
    source="[1]",
)
def predictive_entropy(predictions: Predictions) -> FloatArray:
    """(D,), nats: entropy of the ensemble."""
    return information.predictive_entropy(predictions.probabilities)


@_information(
    unit="nats",
    range="0–ln C",
    in_table=True,
    definition="(1/N) Σ_m H[p_m], what the members agree is uncertain",
    source="[1]",
)
def expected_entropy(predictions: Predictions) -> FloatArray:
    """(D,), nats: mean entropy of the members."""
    return information.expected_entropy(predictions.probabilities)


@_information(
    unit="nats",
    range="0–ln min(N, C)",
    in_table=True,
    column="MI",
    definition="H[p̄] − (1/N) Σ_m H[p_m], what the members disagree about",
    source="Houlsby 2011, [1]",
)
def mutual_information(predictions: Predictions) -> FloatArray:
    """(D,), nats: what knowing the member would tell."""
    return information.mutual_information(predictions.probabilities)


@_information(range="0–1", definition="predictive entropy divided by ln C of its document")
def predictive_entropy_normalised(predictions: Predictions) -> FloatArray:
    """(D,): as a share of the most it could be."""
    return disagreement.normalised(predictive_entropy(predictions), predictions.counts)


@_information(range="0–1", definition="expected entropy divided by ln C of its document")
def expected_entropy_normalised(predictions: Predictions) -> FloatArray:
    """(D,): as a share of the most it could be."""
    return disagreement.normalised(expected_entropy(predictions), predictions.counts)


@_information(range="0–1", definition="mutual information divided by ln C of its document")
def mutual_information_normalised(predictions: Predictions) -> FloatArray:
    """(D,): as a share of the document's largest entropy."""
    return disagreement.normalised(mutual_information(predictions), predictions.counts)


@_information(
    range="0–1",
    definition="1 − share of members voting for the most popular choice",
    source="Freeman 1965",
)
def variation_ratio(predictions: Predictions) -> FloatArray:
    """(D,): share of members that are outvoted."""
    return disagreement.variation_ratio(predictions.probabilities)


@_information(
    needs_members=True, range="0–1", definition="share of pairs of members with the same prediction"
)
def pairwise_agreement(predictions: Predictions) -> FloatArray:
    """(D,): over pairs of different members."""
    return disagreement.pairwise_agreement(predictions.probabilities)


@_information(
    needs_members=True,
    range="0–1",
    definition="mean over pairs of ½ Σ_c |p_i(c) − p_j(c)|",
    source="[1]",
)
def pairwise_total_variation(predictions: Predictions) -> FloatArray:
    """(D,): over pairs of different members."""
    return disagreement.pairwise_total_variation(predictions.probabilities)


@_information(
    needs_members=True,
    unit="nats",
    range="0–∞",
    definition="mean over ordered pairs of Σ_c p_i(c) log(p_i(c)/p_j(c))",
)
def pairwise_kl(predictions: Predictions) -> FloatArray:
    """(D,), nats: over ordered pairs of different members."""
    return disagreement.pairwise_kl(predictions.probabilities)
