"""Cross-fitting: each document's scale is fitted on the other folds' documents, never on its own answer.

It is an oracle. It uses labels of the very task that is judged, which a practitioner lacks, and what is left after the
best single scale cannot show over-confidence.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from lm_eval_lora_ensemble.metrics.arrays import FloatArray, IntArray
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.temperature import fit_temperature_of_mixture

FOLDS = 5
LEAST_DOCUMENTS = 80
"""Documents outside a fold below which no scale is fitted: log T would have a standard deviation above .25."""


def fold_of(document_hash: str) -> int:
    """Return the fold of a document from lm-eval's ``doc_hash``, a hexadecimal sha256: duplicates share one."""
    try:
        return int(document_hash[:8], 16) % FOLDS
    except ValueError:  # a file without hashes
        return int(hashlib.sha256(document_hash.encode()).hexdigest()[:8], 16) % FOLDS


@dataclass(frozen=True, eq=False)
class CrossFit:
    """The temperatures that cross-fitting gives.

    Attributes:
        temperatures: (D,), each from the documents of other folds; NaN throughout where ``undefined`` says why.
        undefined: empty, or why there is no scale.
        at_upper_limit: some fold's T ended at the upper limit: uniform is best, the model is at chance level.
    """

    temperatures: FloatArray
    undefined: str = ""
    at_upper_limit: bool = False


def crossfit(predictions: Predictions, folds: IntArray) -> CrossFit:
    """Fit one temperature a fold, for the mixture of the members, on the documents of the other folds.

    Args:
        predictions: at T = 1, with gold answers.
        folds: (D,), the fold of each document.

    Raises:
        EnsembleError: unknown gold answers.
    """
    is_gold = predictions.require_gold()
    temperatures = np.full(predictions.n_documents, np.nan)
    impossible = np.isneginf(predictions.log_gold_mass)
    if impossible.any():
        document = predictions.documents[int(np.argmax(impossible))]
        return _undefined(temperatures, f"the gold answer of document {document} has probability 0")
    at_upper_limit = False
    for fold in np.unique(folds):
        inside = folds == fold
        others = int((~inside).sum())
        if others < LEAST_DOCUMENTS:
            return _undefined(
                temperatures, f"{others} documents outside a fold; {LEAST_DOCUMENTS} are needed"
            )
        fitted = fit_temperature_of_mixture(predictions.log_probabilities[:, ~inside], is_gold[~inside])
        if fitted.at_limit and fitted.temperature < 1:
            return _undefined(temperatures, "every answer is right, so that no finite scale is best")
        at_upper_limit |= fitted.at_limit
        temperatures[inside] = fitted.temperature
    return CrossFit(temperatures, at_upper_limit=at_upper_limit)


def _undefined(temperatures: FloatArray, why: str) -> CrossFit:
    return CrossFit(np.full_like(temperatures, np.nan), undefined=why)
