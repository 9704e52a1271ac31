"""Samples of tasks of generated texts: read as arrays, and whether their scores tell wrong answers from right ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.answers import ANSWER_SCORES, error_statistics
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate, ResamplingPlan, bootstrap
from lm_eval_lora_ensemble.metrics.calibration import DEFAULT_BINS, CalibrationBins
from lm_eval_lora_ensemble.metrics.detection import Detection
from lm_eval_lora_ensemble.metrics.ranking import Ranking
from lm_eval_lora_ensemble.metrics.selection import risk_coverage

# what lm-eval's generative tasks call right or wrong; of several, the first
_RIGHT = ("exact_match", "acc", "em", "prompt_level_strict_acc", "math_verify")
_CURVE_POINTS = 101


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """How sure the members were of each answer of a task.

    Attributes:
        scores: (D,) by the names of ``ANSWER_SCORES``, nats; of several texts of a document, their mean.
        correct: bool (D,) by lm-eval's filter; empty where the task has no right and wrong.
        all_correct: bool (D + left_out,) by filter, of the documents without a score too.
        judged_by: by filter, the task's metric that says so.
        n_members: N.
        left_out: documents without a score, such as those whose text is a thought and nothing else.
        keys: (D,) lm-eval's document numbers.
    """

    scores: Mapping[str, FloatArray]
    correct: Mapping[str, npt.NDArray[np.bool_]]
    all_correct: Mapping[str, npt.NDArray[np.bool_]]
    judged_by: Mapping[str, str]
    n_members: int
    left_out: int
    keys: npt.NDArray[np.int64]

    @property
    def n_documents(self) -> int:
        """D."""
        return len(self.keys)

    def ranking_scores(self) -> dict[str, FloatArray]:
        """Return the scores that differ between documents for this number of members."""
        return {
            name: values
            for name, values in self.scores.items()
            if self.n_members > 1 or not ANSWER_SCORES[name].needs_members
        }


@dataclass(frozen=True)
class ScoreResult:
    """How well one score tells wrong answers from right ones.

    Attributes:
        auroc: P(a wrong answer scores above a right one) + ½ P(equal), chance ½.
        aurc: area under the risk–coverage curve, lower is better.
        prr: prediction rejection ratio, 1 for a perfect ranking, 0 for a random one.
        risk_coverage: (coverage, risk) pairs, thinned to a hundred.
    """

    auroc: Estimate
    aurc: Estimate
    prr: Estimate
    risk_coverage: list[tuple[float, float]]


@dataclass(frozen=True)
class AnswerResult:
    """A task of generated texts under one of lm-eval's filters.

    Attributes:
        documents: D, those with a score.
        left_out: documents without a score.
        members: N.
        judged_by: the task's metric that says what is right; empty where none does.
        means: of each score.
        accuracy: share of right answers, of the documents without a score too; None where there is no right and wrong,
            as for all that follows.
        errors: by score.
        confidence: mean of p(answer) = exp(−answer_nll).
        ece: expected calibration error of p(answer).
    """

    documents: int
    left_out: int
    members: int
    judged_by: str
    means: dict[str, Estimate]
    accuracy: Estimate | None
    errors: dict[str, ScoreResult]
    confidence: Estimate | None
    ece: Estimate | None


def is_answer(sample: Mapping[str, Any]) -> bool:
    """Whether a sample carries how sure an ensemble was of its texts."""
    blocks = sample.get("generation")
    return isinstance(blocks, list) and all(isinstance(block, dict) and "tokens" in block for block in blocks)


class AnswerReader:
    """Collects the samples of one file, in whatever order its ranks and filters wrote them.

    Args:
        path: of the file, for messages.
        lower_is_better: the task's metrics of which the results file says so; none of them says what is right.
    """

    def __init__(self, path: Path, lower_is_better: Collection[str] = ()) -> None:
        self._path = path
        self._not_right = {*ANSWER_SCORES, *lower_is_better}
        self._scores: dict[int, dict[str, float]] = {}
        self._members: set[int] = set()
        self._judged: dict[str, dict[int, dict[str, float]]] = {}

    def add(self, sample: Mapping[str, Any], number: int) -> None:
        """Take the sample of line ``number``.

        Raises:
            EnsembleError: the document was there before under this filter, or it is no sample of this run.
        """
        place = f"{self._path}, line {number}"
        try:
            document, filter_key = int(sample["doc_id"]), str(sample.get("filter", "none"))
            blocks = sample["generation"]
            self._members |= {len(block["members"]) for block in blocks}
            scores = {name: _mean([block[name] for block in blocks]) for name in ANSWER_SCORES}
            judged = {
                name: float(sample[name])
                for name in sample.get("metrics", ())
                if isinstance(sample.get(name), (bool, int, float))
            }
        except (KeyError, TypeError, ValueError) as error:
            raise EnsembleError(
                f"{place}: not a sample of generated texts ({type(error).__name__}: {error})"
            ) from error
        of_filter = self._judged.setdefault(filter_key, {})
        if document in of_filter:
            raise EnsembleError(
                f"{place}: document {document} occurs twice; two runs were written to one file"
            )
        if len(self._members) > 1:
            raise EnsembleError(
                f"{place}: {' and '.join(map(str, sorted(self._members)))} members; samples of two ensembles were mixed"
            )
        of_filter[document] = judged
        self._scores[document] = scores

    def scores(self) -> AnswerScores:
        """Return the documents by their numbers."""
        known = [d for d, scores in sorted(self._scores.items()) if not any(map(math.isnan, scores.values()))]
        correct, all_correct, judged_by = {}, {}, {}
        for filter_key, documents in self._judged.items():
            name = self._right_or_wrong(list(documents.values()))
            if name and len(documents) == len(self._scores):
                correct[filter_key] = np.array([documents[d][name] == 1 for d in known])
                all_correct[filter_key] = np.array([of[name] == 1 for _, of in sorted(documents.items())])
                judged_by[filter_key] = name
        return AnswerScores(
            scores={name: np.array([self._scores[d][name] for d in known]) for name in ANSWER_SCORES},
            correct=correct,
            all_correct=all_correct,
            judged_by=judged_by,
            n_members=next(iter(self._members), 0),
            left_out=len(self._scores) - len(known),
            keys=np.array(known, dtype=np.int64),
        )

    def _right_or_wrong(self, documents: Sequence[Mapping[str, float]]) -> str:
        """Return the metric by which every document is right or wrong; empty if there is none."""
        binary = [
            name
            for name in documents[0]
            if name not in self._not_right and all(of.get(name) in (0.0, 1.0) for of in documents)
        ]
        return next((name for name in (*_RIGHT, *binary) if name in binary), "")


def _mean(values: Sequence[float | None]) -> float:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def evaluate_answers(
    scores: AnswerScores, plan: ResamplingPlan, bins: int = DEFAULT_BINS
) -> dict[str, AnswerResult]:
    """Compute, by lm-eval's filter, a task's values with their intervals over documents, members held fixed.

    A task without right and wrong has one entry, ``none``, with the means alone.
    """
    ranked = scores.ranking_scores()

    def means(weights: FloatArray) -> dict[str, FloatArray]:
        return {name: weights @ values / weights.sum(axis=1) for name, values in scores.scores.items()}

    drawn = bootstrap(means, plan)
    shared = {name: drawn.estimate(name) for name in scores.scores}

    def result(filter_key: str) -> AnswerResult:
        correct = scores.correct.get(filter_key)
        base = AnswerResult(
            scores.n_documents, scores.left_out, scores.n_members, "", shared, None, {}, None, None
        )
        if correct is None:
            return base
        of_errors = bootstrap(error_statistics(ranked, correct), plan)
        confidence = np.exp(-scores.scores["answer_nll"])
        binned = CalibrationBins(confidence, correct, bins)

        def calibration(weights: FloatArray) -> dict[str, FloatArray]:
            return {
                "confidence": weights @ confidence / weights.sum(axis=1),
                "ece": binned.sums(weights).l1(),
            }

        of_answers = bootstrap(calibration, plan)
        right = scores.all_correct[filter_key].astype(np.float64)
        accuracy = bootstrap(
            lambda weights: {"accuracy": weights @ right / weights.sum(axis=1)},
            replace(plan, documents=len(right)),
        )
        return AnswerResult(
            scores.n_documents,
            scores.left_out,
            scores.n_members,
            scores.judged_by[filter_key],
            shared,
            accuracy.estimate("accuracy"),
            {
                name: ScoreResult(
                    auroc=of_errors.estimate(f"{name}/auroc"),
                    aurc=of_errors.estimate(f"{name}/aurc"),
                    prr=of_errors.estimate(f"{name}/prr"),
                    risk_coverage=_curve(values, ~correct),
                )
                for name, values in ranked.items()
            },
            of_answers.estimate("confidence"),
            of_answers.estimate("ece"),
        )

    return {filter_key: result(filter_key) for filter_key in scores.correct or ("none",)}


def _curve(uncertainty: FloatArray, wrong: npt.NDArray[np.bool_]) -> list[tuple[float, float]]:
    curve = risk_coverage(uncertainty, wrong)
    points = np.unique(np.linspace(0, len(curve.coverage) - 1, _CURVE_POINTS).round().astype(int))
    return [(float(curve.coverage[i]), float(curve.risk[i])) for i in points]


def detect_answers(
    inside: AnswerScores, outside: AnswerScores, *, resamples: int, seed: int, level: float
) -> dict[str, Detection]:
    """Tell out-of-domain from in-domain documents by each score of their answers; out-of-domain is the positive class.

    Raises:
        EnsembleError: the two sides have different numbers of members.
    """
    if inside.n_members != outside.n_members:
        raise EnsembleError(
            f"the in-domain texts have {inside.n_members} members and the out-of-domain ones {outside.n_members}: "
            "they come from two ensembles; evaluate both with one"
        )
    sizes = [inside.n_documents, outside.n_documents]
    is_out = np.repeat([False, True], sizes)
    rankings = {
        name: Ranking(np.concatenate([values, outside.scores[name]]), is_out)
        for name, values in inside.ranking_scores().items()
    }

    def statistics(weights: FloatArray) -> dict[str, FloatArray]:
        found: dict[str, FloatArray] = {}
        for name, ranking in rankings.items():
            runs = ranking.runs(weights)
            found[f"{name}/auroc"] = runs.auroc()
            found[f"{name}/aupr"] = runs.average_precision()
            found[f"{name}/fpr95"] = runs.false_positive_rate(0.95)
        return found

    drawn = bootstrap(
        statistics, ResamplingPlan(sum(sizes), resamples, seed, strata=np.repeat([0, 1], sizes), level=level)
    )
    return {
        name: Detection(
            drawn.estimate(f"{name}/auroc"), drawn.estimate(f"{name}/aupr"), drawn.estimate(f"{name}/fpr95")
        )
        for name in rankings
    }
