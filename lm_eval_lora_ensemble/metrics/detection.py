"""Detection: does the uncertainty tell questions of another domain from those of its own?

Higher scores always mean more out-of-domain, and out-of-domain is the positive class. Entropies of tasks
with different numbers of choices differ for that reason alone: compare tasks of equal C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray, IntArray
from lm_eval_lora_ensemble.metrics.battery import uncertainty_scores
from lm_eval_lora_ensemble.metrics.bootstrap import Bootstrapped, Estimate, ResamplingPlan, bootstrap
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.ranking import Ranking

MOST_DIFFERENT_LENGTHS = 1.5
"""The ratio of two domains' mean answer lengths above which mutual information carries a note."""

_NAN = float("nan")
_UNDEFINED = Estimate(_NAN, _NAN, _NAN, (_NAN, _NAN), (_NAN, _NAN), (_NAN, _NAN))


@dataclass(frozen=True)
class Detection:
    """How well one score detects out-of-domain documents.

    Attributes:
        auroc: area under the ROC curve, in [0, 1], chance 0.5.
        aupr: average precision with out-of-domain as the positive class; chance is its share.
        fpr95: share of in-domain documents flagged when 95 % of the out-of-domain ones are, lower is better.
        note: what a reader must know of this number, or why it is NaN; empty where nothing.
    """

    auroc: Estimate
    aupr: Estimate
    fpr95: Estimate
    note: str = ""


@dataclass(frozen=True)
class AnswerForm:
    """What the choices of a task look like, as far as the number of their characters tells.

    Attributes:
        characters: mean over all choices of all documents.
        letters: no choice has more than one character, or the class "other" is one of them.
    """

    characters: float
    letters: bool

    @classmethod
    def of(cls, scores: ChoiceScores) -> AnswerForm | None:
        """Return the form of a task's choices; None where their lengths are unknown."""
        if scores.other_class:
            return cls(1.0, letters=True)
        if "chars" not in scores.lengths:
            return None
        present = np.arange(scores.lengths["chars"].shape[1]) < scores.counts[:, None]
        lengths = scores.lengths["chars"][present]
        return cls(float(lengths.mean()), letters=bool((lengths <= 1).all()))


def mark_other_forms(
    detected: Mapping[str, Detection], in_domain: AnswerForm | None, out_of_domain: AnswerForm | None
) -> dict[str, Detection]:
    """Say of mutual information whether the two sides' answers have one form; letters against texts make it NaN.

    What members disagree about shrinks with the length of the answers that are judged per character, and grows with
    it where they are judged by sums, in any domain.

    Args:
        detected: by score, from :func:`detect`.
        in_domain: None where it is unknown.
        out_of_domain: None where it is unknown.
    """
    found = dict(detected)
    if "mutual_information" not in found:
        return found
    if in_domain is None or out_of_domain is None:
        note = "the samples do not say how long the answers are, so their forms are not compared"
    elif in_domain.letters != out_of_domain.letters:
        note = "letters against answers written out: their mutual information does not compare"
        found["mutual_information"] = Detection(_UNDEFINED, _UNDEFINED, _UNDEFINED)
    else:
        means = in_domain.characters, out_of_domain.characters
        if max(means) <= MOST_DIFFERENT_LENGTHS * min(means):
            return found
        note = (
            f"answers of {means[1]:.0f} characters out of domain and {means[0]:.0f} in it: "
            "mutual information changes with length too"
        )
    found["mutual_information"] = replace(found["mutual_information"], note=note)
    return found


class DetectionStatistics:
    """AUROC, AUPR and FPR95 of every score, under document weights over in-domain then out-of-domain."""

    def __init__(self, in_domain: Predictions, out_of_domain: Predictions) -> None:
        inside, outside = uncertainty_scores(in_domain), uncertainty_scores(out_of_domain)
        is_out = np.repeat([False, True], [in_domain.n_documents, out_of_domain.n_documents])
        self._rankings = {
            name: Ranking(np.concatenate([inside[name], outside[name]]), is_out) for name in inside
        }

    @property
    def scores(self) -> list[str]:
        """The scores' names."""
        return list(self._rankings)

    def __call__(self, weights: FloatArray) -> dict[str, FloatArray]:
        """Return (R,) for each of ``{score}/auroc``, ``{score}/aupr`` and ``{score}/fpr95``."""
        values: dict[str, FloatArray] = {}
        for name, ranking in self._rankings.items():
            runs = ranking.runs(weights)
            values[f"{name}/auroc"] = runs.auroc()
            values[f"{name}/aupr"] = runs.average_precision()
            values[f"{name}/fpr95"] = runs.false_positive_rate(0.95)
        return values


def detect(
    in_domain: Predictions,
    out_of_domain: Predictions,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Detection]:
    """Tell out-of-domain from in-domain documents by each uncertainty score (Hendrycks & Gimpel 2017).

    The scores are 1 − max p̄, predictive entropy, expected entropy and mutual information, as in
    arXiv 2402.12264. Gold answers are not needed. Both sides are resampled apart, each keeping its size; of a group
    whole tasks are drawn, of a task documents.

    Args:
        in_domain: the task the members were trained for.
        out_of_domain: another task, scored by the same members.
        resamples: R.
        seed: of the resampling.
        level: of the intervals.

    Returns:
        By score: ``max_probability``, ``entropy``, ``expected_entropy``, ``mutual_information`` (the last
        only with several members).

    Raises:
        EnsembleError: the two sides have different numbers of members, ``resamples`` < 2, or ``level`` outside
            (0, 1).

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> sure = metrics.Predictions.from_scores([[9.0, 0.0], [0.0, 8.0]], gold=None)
        >>> unsure = metrics.Predictions.from_scores([[0.0, 0.1], [0.2, 0.0]], gold=None)
        >>> found = metrics.detect(sure, unsure, resamples=50)
        >>> found["entropy"].auroc.value, found["entropy"].fpr95.value
        (1.0, 0.0)
    """
    if in_domain.n_members != out_of_domain.n_members:
        raise EnsembleError(
            f"the in-domain samples have {in_domain.n_members} members and the out-of-domain ones "
            f"{out_of_domain.n_members}: they come from two ensembles; evaluate both with one"
        )
    sizes = [in_domain.n_documents, out_of_domain.n_documents]
    statistics = DetectionStatistics(in_domain, out_of_domain)
    plan = ResamplingPlan(
        sum(sizes),
        resamples,
        seed,
        clusters=_clusters(in_domain, out_of_domain),
        strata=np.repeat([0, 1], sizes),
        level=level,
    )
    drawn: Bootstrapped = bootstrap(statistics, plan)
    return {
        score: Detection(
            drawn.estimate(f"{score}/auroc"),
            drawn.estimate(f"{score}/aupr"),
            drawn.estimate(f"{score}/fpr95"),
        )
        for score in statistics.scores
    }


def _clusters(*sides: Predictions) -> IntArray | None:
    """Return what is drawn whole on each side, (sum of D,): tasks of a group, documents of a task."""
    if all(side.clusters is None for side in sides):
        return None
    labels = [
        np.arange(side.n_documents)
        if side.clusters is None
        else np.unique(side.clusters, return_inverse=True)[1].reshape(-1)
        for side in sides
    ]
    return np.concatenate(labels).astype(np.int64)
