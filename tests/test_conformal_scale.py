"""Conformal sets on a fitted scale: its documents neither calibrate nor test."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from test_domains import run_of, scores

from lm_eval_lora_ensemble.analysis.conformal_sets import conformal_results, split_for_conformal
from lm_eval_lora_ensemble.analysis.distribution import Distribution
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.conformal import thirds

QUICK = Settings(resamples=20)


def test_thirds_are_disjoint_and_hold_every_document():
    parts = thirds(100, seed=3)
    assert sorted(map(len, parts)) == [33, 33, 34]
    assert sorted(np.concatenate(parts)) == list(range(100))
    with pytest.raises(EnsembleError, match="three parts"):
        thirds(2)


@pytest.mark.parametrize(
    ("distribution", "own"),
    [
        (Distribution("chars", "crossfit"), True),
        (Distribution("sum", "crossfit"), True),
        (Distribution("chars", "a"), True),  # the run's scale was fitted on this very task
        (Distribution("chars", "b"), False),
        (Distribution(), False),
    ],
)
def test_the_scale_of_the_task_itself_takes_a_third_part(distribution, own):
    run = run_of(a=scores("a", 0), b=scores("b", 1)).under(distribution)
    first = conformal_results(run, "a", QUICK)[0]
    assert (first.n_scale, first.n_calibration, first.n_test) == ((50, 50, 50) if own else (0, 75, 75))
    assert math.isfinite(first.temperature) == own


def test_a_gold_answer_moves_the_scale_only_from_the_third_part():
    before = scores("a", 0)
    _, _, fitted = split_for_conformal(run_of(a=before).under(Distribution("chars", "crossfit")), "a", 0)
    for part, moves in zip(thirds(150), (True, False, False), strict=True):
        golds = before.is_gold.copy()
        golds[part] = np.roll(golds[part], 1, axis=1)
        run = run_of(a=replace(before, is_gold=golds)).under(Distribution("chars", "crossfit"))
        assert (split_for_conformal(run, "a", 0)[2].temperature != fitted.temperature) == moves


def test_coverage_holds_in_expectation_on_a_fitted_scale():
    covered = []
    for seed in range(40):
        run = run_of(a=scores("a", seed)).under(Distribution("chars", "crossfit"))
        covered.append(conformal_results(run, "a", replace(QUICK, alpha=0.2, seed=seed))[0].coverage.value)
    # 0.8 to 0.8 + 1/51, and three standard errors of the mean of 40
    assert 0.8 - 0.04 < np.mean(covered) < 0.8 + 1 / 51 + 0.04


def test_a_group_has_one_temperature_for_its_tasks():
    run = replace(run_of(a=scores("a", 0), b=scores("b", 1)), groups={"ab": ("a", "b")})
    first = conformal_results(run.under(Distribution("chars", "crossfit")), "ab", QUICK)[0]
    assert (first.n_scale, first.n_calibration, first.n_test) == (100, 100, 100)
