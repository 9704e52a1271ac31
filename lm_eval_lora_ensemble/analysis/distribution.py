"""Which distribution over the choices is judged: a declared choice of scores and of their scale.

| temperature | where T comes from | what it is |
|---|---|---|
| ``1`` | nowhere | the scores as they are |
| ``validation`` | the training task's validation split, by way of the results file | what a practitioner has |
| a task of the run | that task's own documents | what a practitioner with such a task has |
| ``crossfit`` | the other folds of the very documents that are judged | an oracle |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.choice_scores import SCORE_KINDS, ChoiceScores, ScoreKind
from lm_eval_lora_ensemble.metrics.crossfit import CrossFit, crossfit
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.temperature import fit_temperature_of_mixture

CROSSFIT, VALIDATION, RAW = "crossfit", "validation", "1"
_UNITS = {"sum": "summed", "chars": "per character", "bytes": "per byte", "tokens": "per token"}


@dataclass(frozen=True)
class Distribution:
    """A scale for scores.

    Attributes:
        scores: ``sum``, ``chars``, ``bytes`` or ``tokens``: the unit of length that loglikelihoods are divided by.
        temperature: ``1``, ``crossfit``, ``validation``, or the name of a task of the run.
    """

    scores: ScoreKind = "sum"
    temperature: str = RAW

    def __post_init__(self) -> None:
        if self.scores not in SCORE_KINDS:
            raise EnsembleError(f"--scores {self.scores}: use one of {', '.join(SCORE_KINDS)}")

    @property
    def label(self) -> str:
        """What a reader sees: the unit, and where the scale comes from."""
        source = {
            RAW: "T = 1",
            CROSSFIT: "T cross-fitted on the task's own answers (oracle)",
            VALIDATION: "T from validation",
        }.get(self.temperature, f"T fitted on {self.temperature}")
        return f"{_UNITS[self.scores]}, {source}"

    def of(self, scores: ChoiceScores, shared: Scale) -> Predictions:
        """Return one task's distributions.

        Args:
            scores: of the task.
            shared: the run's scale; see :func:`scale_of_run`.

        Raises:
            EnsembleError: the scale is not defined for this task; the message says why.
        """
        if self.temperature == CROSSFIT:
            return _cross_fitted(scores, self.scores)
        return scores.predictions(self.scores, shared.temperature, alone=shared.alone)


@dataclass(frozen=True, eq=False)
class Scale:
    """One run's temperatures.

    Attributes:
        temperature: T, shared by all members.
        alone: (N, 1), each member's own; None where it is the shared one.
    """

    temperature: float = 1.0
    alone: FloatArray | None = None


def scale_of_run(
    distribution: Distribution, scores: Mapping[str, ChoiceScores], config: Mapping[str, Any], n_members: int
) -> Scale:
    """Return the scale that a run's every task is judged on; for ``crossfit``, which has none, T = 1.

    Args:
        distribution: what was declared.
        scores: of the run's tasks.
        config: of its results file.
        n_members: N.

    Raises:
        EnsembleError: no such task, or no temperature in the results file.
    """
    if distribution.temperature in (RAW, CROSSFIT):
        return Scale()
    if distribution.temperature == VALIDATION:
        return _from_validation(distribution, config, n_members)
    if distribution.temperature not in scores:
        raise EnsembleError(
            f"--temperature {distribution.temperature}: give 1, crossfit, validation, or one of the run's tasks "
            f"({', '.join(scores)})"
        )
    fit_on = scores[distribution.temperature].per_unit(distribution.scores)
    return Scale(_fitted(fit_on), np.array([[_fitted(fit_on.only([m]))] for m in range(n_members)]))


def _from_validation(distribution: Distribution, config: Mapping[str, Any], n_members: int) -> Scale:
    ensemble = config.get("lora_ensemble")
    calibration = ensemble.get("calibration") if isinstance(ensemble, Mapping) else None
    try:
        known = calibration["scores"][distribution.scores]  # type: ignore[index]
        shared = float(known["ensemble"]["temperature"])
        alone = np.array([[float(member["temperature"])] for member in known["members"]])
    except (KeyError, TypeError, ValueError):
        raise EnsembleError(
            f"no temperature for scores={distribution.scores} in the results file; `lora-ensemble train` and "
            "`lora-ensemble calibrate ENSEMBLE TASK` write one, then evaluate again"
        ) from None
    if len(alone) != n_members:
        raise EnsembleError(
            f"{len(alone)} members have a temperature from validation and the run has {n_members}"
        )
    return Scale(shared, alone)


def _fitted(predictions: Predictions) -> float:
    fitted = fit_temperature_of_mixture(predictions.log_probabilities, predictions.require_gold())
    if fitted.at_limit and fitted.temperature < 1:
        raise EnsembleError(
            f"--temperature {predictions.subjects[0]}: every answer is right there, so that no finite scale is best; "
            "fit it on a harder task"
        )
    return fitted.temperature


def _cross_fitted(scores: ChoiceScores, kind: ScoreKind) -> Predictions:
    raw = scores.per_unit(kind)
    shared = crossfit(raw, scores.folds)
    _refuse_undefined(shared, scores)
    if scores.n_members == 1:
        return scores.predictions(kind, shared.temperatures)
    alone = [crossfit(raw.only([m]), scores.folds) for m in range(scores.n_members)]
    for fitted in alone:
        _refuse_undefined(fitted, scores)
    return scores.predictions(
        kind, shared.temperatures, alone=np.stack([fitted.temperatures for fitted in alone])
    )


def _refuse_undefined(fitted: CrossFit, scores: ChoiceScores) -> None:
    if fitted.undefined:
        raise EnsembleError(f"no cross-fitted scale for {scores.subjects[0]}: {fitted.undefined}")
