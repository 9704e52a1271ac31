"""Every metric of one set of predictions as one function of document weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lm_eval_lora_ensemble.metrics import disagreement, information
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.calibration import DEFAULT_BINS, CalibrationBins
from lm_eval_lora_ensemble.metrics.classwise import ClasswiseBins, classwise_l1, decompose
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.proper_scores import brier_score
from lm_eval_lora_ensemble.metrics.ranking import Ranking
from lm_eval_lora_ensemble.metrics.selection import (
    accuracy_at,
    area_under_risk_coverage,
    coverage_at,
    optimal_area,
)

Direction = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Metric:
    """What a metric's number means.

    Attributes:
        family: calibration, information or selection.
        direction: which way is better; empty for a description.
        unit: nats, or empty for a pure number.
    """

    family: str
    direction: Direction
    unit: str = ""


_SCORES = ("max_probability", "entropy", "mutual_information")

METRICS: dict[str, Metric] = {
    "accuracy": Metric("calibration", "higher"),
    "nll": Metric("calibration", "lower", "nats"),
    "brier_score": Metric("calibration", "lower"),
    "brier_reliability": Metric("calibration", "lower"),
    "brier_resolution": Metric("calibration", "higher"),
    "brier_uncertainty": Metric("calibration", ""),
    "brier_within_bin": Metric("calibration", ""),
    "ece": Metric("calibration", "lower"),
    "ece_equal_mass": Metric("calibration", "lower"),
    "rms_ce": Metric("calibration", "lower"),
    "mce": Metric("calibration", "lower"),
    "squared_ce_debiased": Metric("calibration", "lower"),
    "classwise_ece": Metric("calibration", "lower"),
    "confidence": Metric("calibration", ""),
    "confidence_gap": Metric("calibration", ""),
    "predictive_entropy": Metric("information", "", "nats"),
    "expected_entropy": Metric("information", "", "nats"),
    "mutual_information": Metric("information", "", "nats"),
    "predictive_entropy_normalised": Metric("information", ""),
    "expected_entropy_normalised": Metric("information", ""),
    "mutual_information_normalised": Metric("information", ""),
    "variation_ratio": Metric("information", ""),
    "pairwise_agreement": Metric("information", ""),
    "pairwise_total_variation": Metric("information", ""),
    "pairwise_kl": Metric("information", "", "nats"),
    **{f"error_auroc_{score}": Metric("selection", "higher") for score in _SCORES},
    **{f"error_aupr_{score}": Metric("selection", "higher") for score in _SCORES},
    **{f"aurc_{score}": Metric("selection", "lower") for score in _SCORES},
    **{f"excess_aurc_{score}": Metric("selection", "lower") for score in _SCORES},
    "accuracy_at_50_coverage": Metric("selection", "higher"),
    "accuracy_at_80_coverage": Metric("selection", "higher"),
    "accuracy_at_90_coverage": Metric("selection", "higher"),
    "coverage_at_5_risk": Metric("selection", "higher"),
}

# what each of the dearer preparations is for
_MASS = {"ece_equal_mass"}
_CLASSWISE = {
    "classwise_ece",
    *(name for name in METRICS if name.startswith("brier_") and name != "brier_score"),
}
_RANKED = {
    score: {name for name in METRICS if METRICS[name].family == "selection" and name.endswith(f"_{score}")}
    for score in _SCORES
}
_COVERAGE = {name for name in METRICS if name.endswith(("_coverage", "_risk"))}
_RANKED["max_probability"] |= _COVERAGE


def uncertainty_scores(predictions: Predictions) -> dict[str, FloatArray]:
    """Return the scores that rank documents, (D,) each; higher is always less certain.

    ``max_probability`` is 1 − max p̄. Mutual information is rounded to 1e-12 nats, so that members that do
    not differ tie instead of being ranked by rounding errors; it is left out for a single member.
    """
    p = predictions.probabilities
    scores = {
        "max_probability": 1.0 - predictions.confidence,
        "entropy": information.predictive_entropy(p),
        "expected_entropy": information.expected_entropy(p),
    }
    if predictions.n_members > 1:
        scores["mutual_information"] = np.round(information.mutual_information(p), 12)
    return scores


class Battery:
    """All of :data:`METRICS` for one set of predictions, under any number of document weightings.

    Whatever can be done once is done here: scoring, sorting, binning. Calling it costs matrix products and
    running sums.

    Args:
        predictions: with gold answers.
        bins: of every binned calibration error.
        metrics: names of those to compute; what only others need, such as ranking, is not done.

    Raises:
        EnsembleError: the gold answers are unknown, ``bins`` < 1.
    """

    def __init__(
        self,
        predictions: Predictions,
        bins: int = DEFAULT_BINS,
        metrics: Collection[str] = METRICS,
    ) -> None:
        self._wanted = set(metrics)
        self._reported = [name for name in METRICS if name in self._wanted]
        gold = predictions.require_gold()
        correct, confidence = predictions.correct, predictions.confidence
        means = _document_means(predictions, self._wanted)
        self._names = list(means)
        self._values = np.stack(list(means.values()), axis=1)
        self._bins = CalibrationBins(confidence, correct, bins)
        self._mass_bins = CalibrationBins(confidence, correct, bins, "mass") if _MASS & self._wanted else None
        self._classes = (
            ClasswiseBins(predictions.mixture, gold, bins, predictions.counts)
            if _CLASSWISE & self._wanted
            else None
        )
        self._ranked = [score for score in _SCORES if _RANKED[score] & self._wanted]
        scores = uncertainty_scores(predictions) if self._ranked else {}
        self._rankings = {name: Ranking(scores[name], ~correct) for name in self._ranked if name in scores}

    def __call__(self, weights: FloatArray) -> dict[str, FloatArray]:
        """Return every metric, (R,), for ``weights`` (R, D) that are whole numbers."""
        with np.errstate(invalid="ignore"):
            means = weights @ self._values / weights.sum(axis=1, keepdims=True)
        values = dict(zip(self._names, means.T, strict=True))
        values.update(self._calibration(weights, values))
        for name in self._ranked:
            values.update(self._selection(name, weights))
        return {name: values[name] for name in self._reported}

    def _calibration(self, weights: FloatArray, means: dict[str, FloatArray]) -> dict[str, FloatArray]:
        sums = self._bins.sums(weights)
        values = {
            "ece": sums.l1(),
            "rms_ce": sums.l2(),
            "mce": sums.largest(),
            "squared_ce_debiased": sums.squared_debiased(),
            "confidence_gap": means["confidence"] - means["accuracy"],
        }
        if self._mass_bins is not None:
            values["ece_equal_mass"] = self._mass_bins.sums(weights).l1()
        if self._classes is not None:
            classes = self._classes.sums(weights)
            brier = decompose(classes, means["brier_score"])
            values |= {
                "classwise_ece": classwise_l1(classes),
                "brier_reliability": brier.reliability,
                "brier_resolution": brier.resolution,
                "brier_uncertainty": brier.uncertainty,
                "brier_within_bin": brier.within_bin,
            }
        return values

    def _selection(self, name: str, weights: FloatArray) -> dict[str, FloatArray]:
        if name not in self._rankings:
            return dict.fromkeys(_RANKED[name], np.full(len(weights), np.nan))
        runs = self._rankings[name].runs(weights)
        values: dict[str, FloatArray] = {}
        if f"error_auroc_{name}" in self._wanted:
            values[f"error_auroc_{name}"] = runs.auroc()
        if f"error_aupr_{name}" in self._wanted:
            values[f"error_aupr_{name}"] = runs.average_precision()
        if {f"aurc_{name}", f"excess_aurc_{name}"} & self._wanted:
            area = area_under_risk_coverage(runs)
            values |= {f"aurc_{name}": area, f"excess_aurc_{name}": area - optimal_area(runs)}
        if name == "max_probability" and _COVERAGE & self._wanted:
            values |= {f"accuracy_at_{c}_coverage": accuracy_at(runs, c / 100) for c in (50, 80, 90)}
            values["coverage_at_5_risk"] = coverage_at(runs, 0.05)
        return values


def _document_means(predictions: Predictions, wanted: Collection[str]) -> dict[str, FloatArray]:
    """Return the per-document values, (D,), of the wanted metrics that are means over documents.

    Accuracy, confidence and Brier score always: other metrics are made of them.
    """
    p, counts, gold = predictions.probabilities, predictions.counts, predictions.require_gold()
    always = {
        "accuracy": predictions.correct.astype(np.float64),
        "confidence": predictions.confidence,
        "brier_score": brier_score(predictions.mixture, gold),
        # From log p̄ and not from p̄, which a long continuation can underflow.
        "nll": -predictions.log_mixture[np.arange(len(gold)), gold] + 0.0,
    }
    of_members: dict[str, Callable[[FloatArray], FloatArray]] = {
        "predictive_entropy": information.predictive_entropy,
        "expected_entropy": information.expected_entropy,
        "mutual_information": information.mutual_information,
        "variation_ratio": disagreement.variation_ratio,
        "pairwise_agreement": disagreement.pairwise_agreement,
        "pairwise_total_variation": disagreement.pairwise_total_variation,
        "pairwise_kl": disagreement.pairwise_kl,
    }
    needed = {name for name in of_members if name in wanted or f"{name}_normalised" in wanted}
    values = {name: of(p) for name, of in of_members.items() if name in needed}
    normalised = {
        f"{name}_normalised": disagreement.normalised(value, counts)
        for name, value in values.items()
        if f"{name}_normalised" in wanted
    }
    return always | values | normalised
