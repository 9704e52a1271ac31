"""Conformal prediction sets: as many choices as it takes to hold the gold one 90 % of the time.

A threshold is calibrated on some documents and used on others. If the two are exchangeable, the sets hold
the gold choice with probability at least 1 − α, whatever the model is worth; a better model needs
smaller sets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray, IntArray
from lm_eval_lora_ensemble.metrics.predictions import Predictions

Method = Literal["thr", "aps", "raps"]
METHODS: tuple[Method, ...] = get_args(Method)


def nonconformity(
    predictions: Predictions,
    method: Method,
    rng: np.random.Generator,
    *,
    penalty: float = 0.01,
    free_ranks: int = 2,
) -> FloatArray:
    """Return how badly each choice would fit as the answer.

    * ``thr``: ``1 − p̄(c)`` (Sadinle, Lei & Wasserman 2019).
    * ``aps``: ``Σ_{c' before c} p̄(c') + U p̄(c)`` in descending order of probability, U uniform on [0, 1]
      and common to a document's choices (Romano, Sesia & Candès 2020).
    * ``raps``: ``aps`` plus ``penalty · max(0, rank(c) − free_ranks)``, ranks from 1
      (Angelopoulos et al. 2021).

    Args:
        predictions: (N, D, C).
        method: one of the three.
        rng: for U.
        penalty: of ``raps``.
        free_ranks: of ``raps``.

    Returns:
        (D, C), +inf for padding.

    Raises:
        EnsembleError: an unknown method.
    """
    p = predictions.mixture
    if method == "thr":
        score = 1.0 - p
    elif method in METHODS:
        order = np.argsort(-p, axis=1, kind="stable")
        ordered = np.take_along_axis(p, order, axis=1)
        before = np.cumsum(ordered, axis=1) - ordered
        ranked = before + rng.uniform(size=(len(p), 1)) * ordered
        if method == "raps":
            ranked += penalty * np.maximum(0, np.arange(1, p.shape[1] + 1) - free_ranks)
        score = np.empty_like(ranked)
        np.put_along_axis(score, order, ranked, axis=1)
    else:
        raise EnsembleError(f"conformal method {method!r} is unknown; use one of {', '.join(METHODS)}")
    score[predictions.padding] = np.inf
    return score


def conformal_threshold(scores: FloatArray, alpha: float) -> float:
    """Return the ⌈(n + 1)(1 − α)⌉-th smallest of the documents' scores (n,), +inf if n is too small.

    Raises:
        EnsembleError: no scores, or ``alpha`` outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise EnsembleError(f"alpha is {alpha}; an error rate between 0 and 1 is needed")
    n = len(scores)
    if n == 0:
        raise EnsembleError("there is no document to calibrate a conformal threshold on")
    rank = math.ceil((n + 1) * (1 - alpha) - 1e-12)
    return float(np.partition(scores, rank - 1)[rank - 1]) if rank <= n else math.inf


@dataclass(frozen=True, eq=False)
class ConformalSets:
    """Prediction sets of the test documents.

    Attributes:
        method: ``thr``, ``aps`` or ``raps``.
        alpha: the error rate asked for.
        threshold: calibrated; +inf means all choices, always.
        n_calibration: documents it was calibrated on.
        sets: (D, C), whether a choice is in its document's set. A set may be empty.
        covered: (D,), whether a gold choice is.
        sizes: (D,), choices in the set.
    """

    method: Method
    alpha: float
    threshold: float
    n_calibration: int
    sets: BoolArray
    covered: BoolArray
    sizes: FloatArray

    @property
    def coverage(self) -> float:
        """Share of documents whose set holds the gold choice; 1 − α to 1 − α + 1/(n + 1) in expectation."""
        return float(self.covered.mean())

    @property
    def mean_size(self) -> float:
        """Mean number of choices, lower is better at the same coverage."""
        return float(self.sizes.mean())


def conformal_sets(
    calibration: Predictions,
    test: Predictions,
    method: Method = "thr",
    alpha: float = 0.1,
    *,
    seed: int = 0,
    penalty: float = 0.01,
    free_ranks: int = 2,
) -> ConformalSets:
    """Calibrate split-conformal sets on one split and form them on another (Angelopoulos & Bates 2021).

    Coverage is marginal, over both splits, and holds only if they are exchangeable: not for another task.

    Args:
        calibration: with gold answers.
        test: with gold answers, of the same members.
        method: see :func:`nonconformity`.
        alpha: the error rate to keep, in (0, 1).
        seed: of the randomised scores.
        penalty: of ``raps``.
        free_ranks: of ``raps``.

    Returns:
        The test documents' sets; with too few calibration documents for ``alpha`` they hold every choice.

    Raises:
        EnsembleError: unknown gold answers or method, or ``alpha`` outside (0, 1).

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> from math import log
        >>> scores = [[log(0.75), log(0.25)]] * 4
        >>> predictions = metrics.Predictions.from_scores(scores, gold=[0, 0, 0, 1])
        >>> sets = metrics.conformal_sets(predictions, predictions, alpha=0.5)  # threshold 1 − 0.75
        >>> sets.coverage, sets.mean_size, round(sets.threshold, 3)
        (0.75, 1.0, 0.25)
    """
    rng = np.random.default_rng(seed)
    gold = calibration.require_gold()
    options = {"penalty": penalty, "free_ranks": free_ranks}
    scores = nonconformity(calibration, method, rng, **options)  # type: ignore[arg-type]
    # of several gold choices the one that fits best counts: a set that holds it holds a right answer
    threshold = conformal_threshold(np.where(gold, scores, np.inf).min(axis=1), alpha)
    fits = nonconformity(test, method, rng, **options)  # type: ignore[arg-type]
    sets: BoolArray = (fits <= threshold) & ~test.padding
    truth = test.require_gold()
    return ConformalSets(
        method=method,
        alpha=alpha,
        threshold=threshold,
        n_calibration=len(gold),
        sets=sets,
        covered=np.asarray((sets & truth).any(axis=1), dtype=np.bool_),
        sizes=sets.sum(axis=1).astype(np.float64),
    )


def split(predictions: Predictions, share: float = 0.5, seed: int = 0) -> tuple[Predictions, Predictions]:
    """Split documents at random into two parts, the first with ``share`` of them.

    Raises:
        EnsembleError: a part would be empty.
    """
    d = predictions.n_documents
    first = round(d * share)
    if not 0 < first < d:
        raise EnsembleError(f"{d} documents cannot be split into two parts with a share of {share}")
    order = np.random.default_rng(seed).permutation(d)
    return predictions.take(np.sort(order[:first])), predictions.take(np.sort(order[first:]))


def thirds(documents: int, seed: int = 0) -> tuple[IntArray, IntArray, IntArray]:
    """Return three random parts of equal size, as indices: for a scale, for calibration and for the test.

    A scale fitted on documents that calibrate or test would break the exchangeability that coverage rests on.

    Raises:
        EnsembleError: fewer than three documents.
    """
    if documents < 3:
        raise EnsembleError(f"{documents} documents cannot be split into three parts")
    order = np.random.default_rng(seed).permutation(documents)
    first, second, third = (np.sort(part) for part in np.array_split(order, 3))
    return first, second, third
