"""All metrics of one set of predictions as one function of document weights.

Whatever does not depend on the weights, scoring, sorting, binning, is done once and only if a metric asks for it; a
weighting then costs matrix products and running sums.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import numpy as np

from lm_eval_lora_ensemble.errors import EnsembleError, nearest
from lm_eval_lora_ensemble.metrics import information
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.calibration import DEFAULT_BINS, BinSums, CalibrationBins
from lm_eval_lora_ensemble.metrics.classwise import BrierDecomposition, ClasswiseBins, decompose
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.ranking import Ranking, Runs
from lm_eval_lora_ensemble.metrics.registry import METRICS


def uncertainty_scores(predictions: Predictions) -> dict[str, FloatArray]:
    """Return the scores that rank documents; higher is always less certain.

    Mutual information is rounded to 1e-12 nats, so that members that do not differ tie instead of being ranked
    by rounding errors.

    Args:
        predictions: gold answers are not needed.

    Returns:
        (D,) each: ``max_probability``, which is 1 − max p̄, in [0, 1 − 1/C]; ``entropy`` (predictive) and
        ``expected_entropy``, nats, in [0, ln C]; with several members ``mutual_information``, nats, in
        [0, ln N].

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> predictions = metrics.Predictions.from_scores([[[0.0, 0.0]], [[0.0, 0.0]]], gold=None)
        >>> {name: round(float(score[0]), 3) for name, score in metrics.uncertainty_scores(predictions).items()}
        {'max_probability': 0.5, 'entropy': 0.693, 'expected_entropy': 0.693, 'mutual_information': 0.0}
    """
    p = predictions.probabilities
    scores = {
        "max_probability": predictions.least_confidence,
        "entropy": information.predictive_entropy(p),
        "expected_entropy": information.expected_entropy(p),
    }
    if predictions.n_members > 1:
        scores["mutual_information"] = np.round(information.mutual_information(p), 12)
    return scores


class Preparation:
    """What the metrics of one set of predictions share, each part made when it is first asked for.

    Attributes:
        predictions: the documents.
        n_bins: of every binned calibration error.
    """

    def __init__(self, predictions: Predictions, n_bins: int) -> None:
        self.predictions = predictions
        self.n_bins = n_bins
        self._document_values: dict[str, FloatArray] = {}
        self._rankings: dict[str, Ranking] = {}

    @cached_property
    def bins(self) -> CalibrationBins:
        """Confidences in bins of equal width."""
        return CalibrationBins(self.predictions.confidence, self.predictions.correct, self.n_bins)

    @cached_property
    def equal_mass_bins(self) -> CalibrationBins:
        """Confidences in bins of equally many documents."""
        return CalibrationBins(self.predictions.confidence, self.predictions.correct, self.n_bins, "mass")

    @cached_property
    def classes(self) -> ClasswiseBins:
        """Every choice position's probabilities in bins of equal width."""
        p = self.predictions
        return ClasswiseBins(p.mixture, p.require_gold(), self.n_bins, p.counts)

    @cached_property
    def scores(self) -> dict[str, FloatArray]:
        """What ranks the documents; see :func:`uncertainty_scores`."""
        return uncertainty_scores(self.predictions)

    def ranking(self, score: str) -> Ranking:
        """Return the documents sorted by a score, errors positive."""
        if score not in self._rankings:
            self._rankings[score] = Ranking(self.scores[score], ~self.predictions.correct)
        return self._rankings[score]

    def document_values(self, name: str) -> FloatArray:
        """Return the (D,) values of a metric that is a mean over documents."""
        if name not in self._document_values:
            self._document_values[name] = METRICS[name].compute(self.predictions)
        return self._document_values[name]


class WeightedDocuments:
    """The documents under R weightings at once: what a metric of all documents is a function of.

    ``documents[name]`` is another metric, (R,), computed once however many metrics are made of it.

    Attributes:
        preparation: what does not depend on the weights.
        weights: (R, D), whole numbers: how often each document counts.
    """

    def __init__(self, preparation: Preparation, weights: FloatArray) -> None:
        self.preparation = preparation
        self.weights = weights
        self._values: dict[str, FloatArray] = {}
        self._runs: dict[str, Runs] = {}

    @property
    def predictions(self) -> Predictions:
        """The documents as they are."""
        return self.preparation.predictions

    def __getitem__(self, name: str) -> FloatArray:
        """Return a metric under every weighting, (R,); NaN where it needs members that there are not."""
        if name not in self._values:
            meaning = METRICS[name]
            if meaning.needs_members and self.predictions.n_members == 1:
                self._values[name] = np.full(len(self.weights), np.nan)
            elif meaning.per_document:
                self._values[name] = self.mean(self.preparation.document_values(name))
            else:
                self._values[name] = meaning.compute(self)
        return self._values[name]

    def mean(self, values: FloatArray) -> FloatArray:
        """Return the weighted means (R,) of values (D,)."""
        with np.errstate(invalid="ignore"):  # an infinite value of weight 0
            means: FloatArray = self.weights @ values / self.totals
        return means

    @cached_property
    def totals(self) -> FloatArray:
        """(R,): documents in each weighting."""
        totals: FloatArray = self.weights.sum(axis=1)
        return totals

    @cached_property
    def bins(self) -> BinSums:
        """Sums of confidence and outcome in bins of equal width."""
        return self.preparation.bins.sums(self.weights)

    @cached_property
    def equal_mass_bins(self) -> BinSums:
        """The same in bins of equally many documents."""
        return self.preparation.equal_mass_bins.sums(self.weights)

    @cached_property
    def classes(self) -> list[BinSums]:
        """Sums of probability and outcome in bins, for every choice position."""
        return self.preparation.classes.sums(self.weights)

    @cached_property
    def brier_parts(self) -> BrierDecomposition:
        """The Brier score's reliability, resolution, uncertainty and remainder; NaN with several golds, see docs."""
        if self.predictions.has_several_golds:
            return BrierDecomposition(*[np.full(len(self.weights), np.nan)] * 4)
        return decompose(self.classes, self["brier_score"])

    def runs(self, score: str) -> Runs:
        """Return the running sums along the documents sorted by one of :func:`uncertainty_scores`."""
        if score not in self._runs:
            self._runs[score] = self.preparation.ranking(score).runs(self.weights)
        return self._runs[score]


class Battery:
    """All of the registry's metrics for one set of predictions, under any number of document weightings.

    Args:
        predictions: with gold answers, if a metric needs them.
        bins: of every binned calibration error.
        metrics: names of those to compute; what only others need, such as ranking, is not done.

    Raises:
        EnsembleError: an unknown metric; the gold answers are unknown; from the first call, ``bins`` < 1.

    Example:
        >>> import numpy as np
        >>> from lm_eval_lora_ensemble import metrics
        >>> predictions = metrics.Predictions.from_scores([[0.0, 1.0], [2.0, 0.0]], [1, 0])
        >>> metrics.Battery(predictions, metrics=["accuracy"])(np.ones((1, 2)))
        {'accuracy': array([1.])}
    """

    def __init__(
        self,
        predictions: Predictions,
        bins: int = DEFAULT_BINS,
        metrics: Collection[str] = METRICS,
    ) -> None:
        wanted = {metrics} if isinstance(metrics, str) else set(metrics)
        unknown = sorted(wanted - METRICS.keys())
        if unknown:
            near = nearest(unknown[0], METRICS)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(METRICS)}"
            raise EnsembleError(f"there is no metric {unknown[0]!r}; {hint}")
        self._names = [name for name in METRICS if name in wanted]
        if any(METRICS[name].needs_gold for name in self._names):
            predictions.require_gold()
        self._preparation = Preparation(predictions, bins)

    def __call__(self, weights: FloatArray) -> dict[str, FloatArray]:
        """Return every metric, (R,), for ``weights`` (R, D) that are whole numbers."""
        documents = WeightedDocuments(self._preparation, weights)
        return {name: documents[name] for name in self._names}
