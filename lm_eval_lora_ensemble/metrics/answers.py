"""How sure an ensemble is of the texts it generates: the scores of an answer, and whether they tell which are wrong.

Scores are made by :mod:`lm_eval_lora_ensemble.generation.measures` while a text is decoded; here they are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.bootstrap import Statistics
from lm_eval_lora_ensemble.metrics.ranking import Ranking, Runs
from lm_eval_lora_ensemble.metrics.selection import area_under_risk_coverage, optimal_area


class AnswerScore(NamedTuple):
    """One number about a generated answer; the higher, the less sure.

    Attributes:
        definition: in the symbols of docs/metrics.md.
        in_table: whether lm-eval's table has its mean.
        needs_members: 0 for a single member, whatever the answer.
    """

    definition: str
    in_table: bool = True
    needs_members: bool = False


ANSWER_SCORES: dict[str, AnswerScore] = {
    "mean_token_entropy": AnswerScore("mean over the tokens of H[p̄], the members averaged equally"),
    "mean_token_mutual_information": AnswerScore(
        "mean over the tokens of H[p̄] − (1/N) Σ_m H[p_m]", needs_members=True
    ),
    "reverse_mutual_information": AnswerScore(
        "(log (1/N) Σ_m exp s_m − (1/N) Σ_m s_m) / L, s_m = log p_m(answer)", needs_members=True
    ),
    "answer_nll": AnswerScore("−log (1/N) Σ_m exp s_m"),
    "normalised_nll": AnswerScore("answer_nll / L", in_table=False),
    "max_token_nll": AnswerScore("−log of the least token probability", in_table=False),
}


def prediction_rejection_ratio(runs: Runs) -> FloatArray:
    """(R,): the share of what a perfect ranking would gain over a random one that this ranking gains.

    ``PRR = (r − AURC) / (r − AURC of the best ranking)``, r the error rate, which is a random ranking's expected AURC.
    1 is perfect, 0 random, below 0 worse; NaN where all answers are right or all wrong. The ratio of Malinin & Gales
    2021 (arXiv 2002.07650) on the risk–coverage curve, over all rejection rates.

    Example:
        >>> from lm_eval_lora_ensemble.metrics.ranking import Ranking
        >>> float(prediction_rejection_ratio(Ranking([0.1, 0.2, 0.9], [0, 0, 1]).runs())[0])
        1.0
    """
    rate = runs.positives[:, 0] / runs.total[:, 0]
    possible = rate - optimal_area(runs)
    gained = rate - area_under_risk_coverage(runs)
    undefined = (runs.positives[:, 0] <= 0) | (runs.positives[:, 0] >= runs.total[:, 0])
    return np.where(undefined, np.nan, gained / np.where(undefined, 1.0, possible))


def error_statistics(scores: Mapping[str, FloatArray], correct: npt.NDArray[np.bool_]) -> Statistics:
    """Return, as a function of document weights, how well each score tells wrong answers from right ones.

    Args:
        scores: (D,) by name, the higher the less sure.
        correct: bool (D,).

    Returns:
        Of weights (R, D): ``{score}/auroc``, ``{score}/aurc`` and ``{score}/prr`` for each score.
    """
    rankings = {name: Ranking(values, ~correct) for name, values in scores.items()}

    def statistics(weights: FloatArray) -> dict[str, FloatArray]:
        found: dict[str, FloatArray] = {}
        for name, ranking in rankings.items():
            runs = ranking.runs(weights)
            found[f"{name}/auroc"] = runs.auroc()
            found[f"{name}/aurc"] = area_under_risk_coverage(runs)
            found[f"{name}/prr"] = prediction_rejection_ratio(runs)
        return found

    return statistics
