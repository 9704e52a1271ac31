"""Conformal sets of a task, their scale never fitted on what calibrates or tests them."""

from __future__ import annotations

import numpy as np

from lm_eval_lora_ensemble.analysis.distribution import CROSSFIT
from lm_eval_lora_ensemble.analysis.result import ConformalResult, Settings
from lm_eval_lora_ensemble.analysis.run import Run
from lm_eval_lora_ensemble.metrics import conformal
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.bootstrap import ResamplingPlan, bootstrap
from lm_eval_lora_ensemble.metrics.choice_scores import scale
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.temperature import FittedTemperature, fit_temperature_of_mixture

Parts = tuple[Predictions, Predictions, FittedTemperature | None]


def conformal_results(run: Run, name: str, settings: Settings) -> list[ConformalResult]:
    """Return the sets by each method; none for a task with too few documents to split.

    Raises:
        EnsembleError: no such task, or unknown gold answers.
    """
    parts = split_for_conformal(run, name, settings.seed)
    if parts is None:
        return []
    calibration, test, fitted = parts
    plan = ResamplingPlan(
        test.n_documents, settings.resamples, settings.seed, clusters=test.clusters, level=settings.level
    )
    results = []
    for method in conformal.METHODS:
        sets = conformal.conformal_sets(calibration, test, method, settings.alpha, seed=settings.seed)
        values = np.stack([sets.covered.astype(np.float64), sets.sizes], axis=1)

        def means(weights: FloatArray, values: FloatArray = values) -> dict[str, FloatArray]:
            coverage, size = (weights @ values / weights.sum(axis=1, keepdims=True)).T
            return {"coverage": coverage, "size": size}

        drawn = bootstrap(means, plan)
        results.append(
            ConformalResult(
                method,
                settings.alpha,
                sets.threshold,
                sets.n_calibration,
                test.n_documents,
                drawn.estimate("coverage"),
                drawn.estimate("size"),
                n_scale=fitted.documents if fitted else 0,
                temperature=fitted.temperature if fitted else float("nan"),
            )
        )
    return results


def split_for_conformal(run: Run, name: str, seed: int) -> Parts | None:
    """Return the calibration part, the test part, and the temperature of a third part where the scale needs one.

    Under ``crossfit``, and on a task that the run's scale was fitted on, a third of the documents gives T, one for a
    group's tasks together; any other scale is fixed, and both halves are judged on it. None for too few documents.
    """
    predictions = run.predictions(name)
    if run.distribution.temperature not in (CROSSFIT, *run.leaves(name)):
        if predictions.n_documents < 2:
            return None
        return (*conformal.split(predictions, 0.5, seed), None)
    if predictions.n_documents < 3:
        return None
    raw = Predictions.concatenate(
        [run.scores[leaf].per_unit(run.distribution.scores) for leaf in run.leaves(name)]
    )
    first, second, third = conformal.thirds(raw.n_documents, seed)
    of_scale = raw.take(first)
    fitted = fit_temperature_of_mixture(of_scale.log_probabilities, of_scale.require_gold())
    scaled = raw.with_log_probabilities(scale(raw.log_probabilities, fitted.temperature))
    return scaled.take(second), scaled.take(third), fitted
