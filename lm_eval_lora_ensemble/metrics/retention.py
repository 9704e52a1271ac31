"""Retention: what fine-tuning kept, lost and gained of what the base model knew.

The prior is the base model alone (epoch 0). A document whose answer it got right is kept or lost by a later
epoch; one it got wrong may be gained. Distances from the prior say how far the distribution moved even where
the answer did not change. arXiv 2402.12264 looks at agreement and total variation with the prior.
"""

from __future__ import annotations

import numpy as np

from lm_eval_lora_ensemble.metrics import disagreement
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.bootstrap import Statistics
from lm_eval_lora_ensemble.metrics.predictions import Predictions, check_same_documents

MEASURES = ("kept", "lost", "gained", "agreement", "total_variation", "kl_to_prior")


def retention(prior: Predictions, later: Predictions) -> Statistics:
    """Return :data:`MEASURES` as a function of document weights, for :func:`.bootstrap.bootstrap`.

    * ``kept``: of the documents the prior got right, the share that is still right, in [0, 1].
    * ``lost``: ``1 − kept``.
    * ``gained``: of the documents the prior got wrong, the share that is right now, in [0, 1].
    * ``agreement``: share of documents with the prior's prediction, right or wrong.
    * ``total_variation``: mean of ``½ Σ_c |p̄(c) − p_prior(c)|``, in [0, 1].
    * ``kl_to_prior``: mean of ``Σ_c p̄(c) log(p̄(c)/p_prior(c))``, nats, ≥ 0.

    A share of no documents is NaN.

    Args:
        prior: of the base model alone.
        later: of an epoch's ensemble, or of one member.

    Raises:
        EnsembleError: other documents, or unknown gold answers.
    """
    check_same_documents(prior, later)
    knew, knows = prior.correct, later.correct
    p, q = later.mixture, prior.mixture
    columns = np.stack(
        [
            knew,
            knew & knows,
            ~knew,
            ~knew & knows,
            disagreement.agreement(p, q),
            disagreement.total_variation(p, q),
            disagreement.kl_divergence(p, q),
        ],
        axis=1,
    ).astype(np.float64)

    def statistics(weights: FloatArray) -> dict[str, FloatArray]:
        right, kept, wrong, gained, same, distance, divergence = (weights @ columns).T
        total = weights.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            of_prior = [kept / right, 1 - kept / right, gained / wrong]
        of_all = [same / total, distance / total, divergence / total]
        return dict(zip(MEASURES, [*of_prior, *of_all], strict=True))

    return statistics
