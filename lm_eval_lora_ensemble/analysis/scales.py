"""What the choice of scale changes: accuracy, nll and ece, summed and per character, by where T comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lm_eval_lora_ensemble.analysis.distribution import CROSSFIT, RAW, VALIDATION, Distribution
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.run import Run
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate, bootstrap, mean_of
from lm_eval_lora_ensemble.metrics.predictions import Predictions

METRICS_BY_SCALE = ("accuracy", "nll", "ece")
SCALES = (
    Distribution("sum", RAW),
    Distribution("sum", VALIDATION),
    Distribution("chars", VALIDATION),
    Distribution("chars", CROSSFIT),
)
"""Raw, what a practitioner has, and the oracle."""


@dataclass(frozen=True)
class ScaleResult:
    """One task under one scale.

    Attributes:
        label: the scale in words.
        undefined: empty, or why the task has no such scale; the rest is empty then.
        ensemble: by metric.
        member_mean: the mean of the members, each on the scale of its own run.
        difference: ensemble minus that mean, paired over the same resamples.
    """

    label: str
    undefined: str
    ensemble: dict[str, Estimate]
    member_mean: dict[str, Estimate]
    difference: dict[str, Estimate]


def by_scale(run: Run, name: str, settings: Settings) -> list[ScaleResult]:
    """Judge a task or group under every scale of :data:`SCALES`.

    Args:
        run: with gold answers for the task.
        name: a task or group of it.
        settings: bins, resamples, seed, level. T is held fixed under resampling.

    Returns:
        One result a scale; nothing for tasks of letters and of unknown lengths, where a length changes nothing.
    """
    leaves = [run.scores[leaf] for leaf in run.leaves(name) if leaf in run.scores]
    long = [s for s in leaves if "chars" in s.lengths and s.lengths["chars"].max() > 1 and not s.other_class]
    if len(long) < len(leaves) or any(s.is_gold is None for s in leaves):
        return []
    alone = _alone(run, name)
    return [_under(alone, name, distribution, settings) for distribution in SCALES]


def _alone(run: Run, name: str) -> Run:
    """Return a run of one task or group as it was read, so that a scale it lacks is told by its own reason."""
    read = run.as_read or run
    leaves = run.leaves(name)
    scores = {leaf: read.scores[leaf] for leaf in leaves if leaf in read.scores}
    return replace(read, scores=scores, groups={name: leaves} if name in run.groups else {})


def _under(run: Run, name: str, distribution: Distribution, settings: Settings) -> ScaleResult:
    try:
        scaled = run.under(distribution)
        predictions = scaled.predictions(name)
    except EnsembleError as error:
        return ScaleResult(distribution.label, str(error), {}, {}, {})
    plan = settings.plan(name, predictions)

    def judge(of: Predictions) -> Battery:
        return Battery(of, settings.bins, METRICS_BY_SCALE)

    ensemble = bootstrap(judge(predictions), plan)
    members = [bootstrap(judge(predictions.member(m)), plan) for m in range(predictions.n_members)]
    average = mean_of(members)
    difference = ensemble.minus(average)
    return ScaleResult(
        distribution.label,
        "",
        {metric: ensemble.estimate(metric) for metric in METRICS_BY_SCALE},
        {metric: average.estimate(metric) for metric in METRICS_BY_SCALE},
        {metric: difference.estimate(metric) for metric in METRICS_BY_SCALE},
    )
