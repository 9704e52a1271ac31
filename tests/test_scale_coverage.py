"""Intervals hold T fixed: a simulation says what that costs their coverage."""

from __future__ import annotations

import numpy as np
from scipy import special

from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import ResamplingPlan, bootstrap
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores
from lm_eval_lora_ensemble.metrics.crossfit import crossfit
from lm_eval_lora_ensemble.metrics.temperature import fit_temperature_of_mixture

N_DOCUMENTS, SIMULATIONS, SCALE = 500, 150, 4.0


def drawn(rng: np.random.Generator, documents: int) -> ChoiceScores:
    """Three members whose scores are four times too sharp, as answers written out are; choices of several lengths."""
    truth = rng.normal(size=(documents, 4))
    gold = (special.softmax(truth, axis=1).cumsum(axis=1) > rng.uniform(size=(documents, 1))).argmax(axis=1)
    members = SCALE * (truth + 0.7 * rng.normal(size=(3, documents, 4)))
    lengths = rng.integers(5, 60, size=(documents, 4)).astype(float)
    return ChoiceScores.of(
        members * lengths,
        np.eye(4, dtype=bool)[gold],
        lengths={"chars": lengths},
        folds=rng.integers(0, 5, size=documents),
    )


def test_the_interval_of_a_cross_fitted_nll_holds_the_truth_nine_times_in_ten():
    rng = np.random.default_rng(17)
    population = drawn(rng, 200_000)
    raw = population.per_unit("chars")
    best = fit_temperature_of_mixture(raw.log_probabilities, raw.require_gold())
    truth = float(-population.predictions("chars", best.temperature).log_gold_mass.mean())
    assert 3 < best.temperature < 8
    covered = 0
    for simulation in range(SIMULATIONS):
        sample = drawn(rng, N_DOCUMENTS)
        fitted = crossfit(sample.per_unit("chars"), sample.folds)
        judged = sample.predictions("chars", fitted.temperatures)
        plan = ResamplingPlan(N_DOCUMENTS, 400, simulation)
        low, high, _ = bootstrap(Battery(judged, metrics=["nll"]), plan).estimate("nll").quoted
        covered += low <= truth <= high
    assert covered / SIMULATIONS >= 0.9
