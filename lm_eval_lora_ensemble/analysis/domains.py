"""Two domains on one scale: what a detection of out-of-domain documents compares.

A scale that is fitted on the task it judges would give each side its own, and the out-of-domain side's would come from
answers that nobody has. Under ``crossfit`` both sides therefore have theirs from the in-domain documents.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval_lora_ensemble.analysis.distribution import CROSSFIT
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.run import Run
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores
from lm_eval_lora_ensemble.metrics.detection import AnswerForm, Detection, detect, mark_other_forms
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.temperature import FittedTemperature, fit_temperature_of_mixture


def detect_all(
    run: Run, ood: Sequence[str], settings: Settings
) -> dict[str, dict[str, dict[str, Detection]]]:
    """Compare each out-of-domain task with each other top-level one: by in-domain task, out-of-domain task, score.

    Raises:
        EnsembleError: a name that the run lacks, or no task besides the out-of-domain ones.
    """
    return {
        inside: {outside: _detect(run, inside, outside, settings) for outside in ood}
        for inside in (in_domain_tasks(run, ood) if ood else [])
    }


def in_domain_tasks(run: Run, ood: Sequence[str]) -> list[str]:
    """Return the top-level tasks that share no document with the out-of-domain ones.

    Raises:
        EnsembleError: a name that the run lacks, or no such task.
    """
    outside = [leaf for name in ood for leaf in run.scored_leaves(name) if leaf in run.tasks]
    inside = run.top_level(besides=outside)
    if not inside:
        raise EnsembleError(f"{run.source} has no task besides {', '.join(ood)}")
    return inside


def out_of_domain(run: Run, inside: str, outside: str) -> Predictions:
    """Return the distributions of out-of-domain documents, to be held against ``run.predictions(inside)``.

    Under ``crossfit`` they have one temperature, fitted on all in-domain documents; no gold answer of theirs is read.
    Any other scale is the run's one already.

    Raises:
        EnsembleError: a name that the run lacks, or in-domain answers that are unknown or all right.
    """
    if run.distribution.temperature != CROSSFIT:
        return run.predictions(outside)
    temperature = temperature_of(run, inside).temperature
    return Predictions.concatenate(
        [
            run.scores[leaf].predictions(run.distribution.scores, temperature)
            for leaf in run.scored_leaves(outside)
        ]
    )


def temperature_of(run: Run, name: str) -> FittedTemperature:
    """Return the one temperature of all documents of a task or group, for the mixture of the run's members.

    Raises:
        EnsembleError: no such name, unknown gold answers, or every answer right, so that no finite scale is best.
    """
    raw = Predictions.concatenate(
        [run.scores[leaf].per_unit(run.distribution.scores) for leaf in run.scored_leaves(name)]
    )
    fitted = fit_temperature_of_mixture(raw.log_probabilities, raw.require_gold())
    if fitted.at_limit and fitted.temperature < 1:
        raise EnsembleError(f"no scale from {name}: every answer is right, and no finite one is best")
    return fitted


def _detect(run: Run, inside: str, outside: str, settings: Settings) -> dict[str, Detection]:
    detected = detect(
        run.predictions(inside),
        out_of_domain(run, inside, outside),
        resamples=settings.resamples,
        seed=settings.seed,
        level=settings.level,
    )
    if not run.scores:  # a run of arrays says nothing about its answers
        return detected
    return mark_other_forms(detected, _form(run, inside), _form(run, outside))


def _form(run: Run, name: str) -> AnswerForm | None:
    return AnswerForm.of(ChoiceScores.concatenate([run.scores[leaf] for leaf in run.scored_leaves(name)]))
