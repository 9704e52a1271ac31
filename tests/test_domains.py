"""Between domains: one scale for both sides, no gold answer of the other domain, and sentences that say no more."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, special

from lm_eval_lora_ensemble import figures
from lm_eval_lora_ensemble.analysis.distribution import Distribution
from lm_eval_lora_ensemble.analysis.domains import out_of_domain
from lm_eval_lora_ensemble.analysis.evaluation import evaluate
from lm_eval_lora_ensemble.analysis.result import Settings, plain
from lm_eval_lora_ensemble.analysis.run import Run
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores
from lm_eval_lora_ensemble.metrics.detection import Detection
from lm_eval_lora_ensemble.report.build import make_report
from lm_eval_lora_ensemble.report.entries import Entry
from lm_eval_lora_ensemble.report.headline import sentences
from lm_eval_lora_ensemble.report.model import Options

QUICK = Settings(resamples=50)
CROSSFIT = Distribution("chars", "crossfit")


def scores(subject: str, seed: int, *, d: int = 150, characters: tuple[int, int] = (20, 40)) -> ChoiceScores:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(*characters, size=(d, 4)).astype(float)
    base = rng.normal(size=(d, 4)) * 2
    gold = (special.softmax(base, axis=1).cumsum(1) > rng.uniform(size=(d, 1))).argmax(1)
    values = (3 * base + rng.normal(size=(3, d, 4))) * lengths
    return ChoiceScores.of(values, np.eye(4, dtype=bool)[gold], lengths={"chars": lengths}, subject=subject)


def run_of(**tasks: ChoiceScores) -> Run:
    return Run("run", "", {}, {n: s.predictions() for n, s in tasks.items()}, scores=tasks)


@pytest.fixture
def run() -> Run:
    return run_of(inside=scores("inside", 0), outside=scores("outside", 1))


def test_the_other_side_has_the_temperature_of_all_in_domain_documents(run):
    inside, outside = run.scores["inside"], run.scores["outside"]
    per_character = inside.loglikelihoods / inside.lengths["chars"]

    def loss(t: float) -> float:
        p = special.softmax(per_character / t, axis=2).mean(axis=0)
        return -np.log(p[inside.is_gold]).mean()

    t = optimize.minimize_scalar(loss, bounds=(0.1, 50), method="bounded", options={"xatol": 1e-9}).x
    expected = special.softmax(outside.loglikelihoods / outside.lengths["chars"] / t, axis=2)
    found = out_of_domain(run.under(CROSSFIT), "inside", "outside")
    assert found.probabilities == pytest.approx(expected, abs=1e-5)
    assert t > 1.5, "at T = 1 the comparison above would prove little"
    own = run.under(CROSSFIT).predictions("outside")
    assert np.abs(own.probabilities - expected).max() > 1e-4


@pytest.mark.parametrize("change", ["permuted", "removed", "all right"])
def test_gold_answers_of_the_other_domain_are_never_read(run, change):
    rng = np.random.default_rng(2)
    outside = run.scores["outside"]
    golds = {
        "permuted": outside.is_gold[rng.permutation(outside.n_documents)],
        "removed": None,
        "all right": np.eye(4, dtype=bool)[outside.loglikelihoods.mean(axis=0).argmax(axis=1)],
    }[change]
    changed = run_of(
        inside=run.scores["inside"], outside=replace(outside, is_gold=golds, missing_gold="gone")
    )
    then, now = (
        evaluate(one.under(CROSSFIT), ood=["outside"], settings=QUICK).detection for one in (run, changed)
    )
    assert plain(then) == plain(now)
    shown = make_report([changed.under(CROSSFIT)], Options(ood=("outside",), settings=QUICK))
    assert plain(shown.detections[0]["inside"]) == plain(
        make_report([run.under(CROSSFIT)], Options(ood=("outside",), settings=QUICK)).detections[0]["inside"]
    )


def test_gold_answers_of_the_own_domain_are(run):
    rng = np.random.default_rng(2)
    inside = run.scores["inside"]
    permuted = replace(inside, is_gold=inside.is_gold[rng.permutation(inside.n_documents)])
    changed = run_of(inside=permuted, outside=run.scores["outside"])
    then, now = (out_of_domain(one.under(CROSSFIT), "inside", "outside") for one in (run, changed))
    assert np.abs(then.probabilities - now.probabilities).max() > 0.01


@pytest.mark.parametrize("distribution", [Distribution(), Distribution("chars", "inside")])
def test_a_scale_of_the_run_is_both_sides_already(run, distribution):
    under = run.under(distribution)
    assert out_of_domain(under, "inside", "outside") is under.predictions("outside")


def test_a_group_is_out_of_domain_where_one_of_its_tasks_has_no_golds(run):
    blind = replace(scores("blind", 4), is_gold=None, missing_gold="gone")
    grouped = replace(run_of(**run.scores, blind=blind), groups={"far": ("outside", "blind")})
    detected = evaluate(grouped.under(CROSSFIT), ood=["far"], settings=QUICK).detection
    assert list(detected) == ["inside"]
    assert out_of_domain(grouped.under(CROSSFIT), "inside", "far").n_documents == 300


def test_mutual_information_compares_only_answers_of_one_form():
    texts = scores("texts", 0)
    tasks = {
        "alike": scores("alike", 1, characters=(22, 44)),
        "longer": scores("longer", 2, characters=(80, 90)),
        "letters": scores("letters", 3, characters=(1, 2)),
        "unknown": replace(scores("unknown", 4), lengths={}),
    }
    found = evaluate(run_of(texts=texts, **tasks), ood=list(tasks), settings=QUICK).detection["texts"]
    information = {name: by_score["mutual_information"] for name, by_score in found.items()}
    assert information["alike"].note == ""
    assert "84 characters out of domain and 30 in it" in information["longer"].note
    assert "do not say how long" in information["unknown"].note
    assert "letters against answers written out" in information["letters"].note
    assert [math.isnan(information[name].auroc.value) for name in tasks] == [False, False, True, False]
    assert math.isfinite(found["letters"]["entropy"].auroc.value)
    assert found["letters"]["entropy"].note == ""
    figures.plot_detection(found)  # a score that is NaN for one task


def detection(value: float, low: float, high: float, note: str = "") -> Detection:
    nothing = (math.nan, math.nan)
    estimate = Estimate(value, 0.0, 0.0, (low, high), (low, high), (low, high))
    return Detection(estimate, *[Estimate(math.nan, math.nan, math.nan, *[nothing] * 3)] * 2, note)


@pytest.mark.parametrize(
    ("auroc", "tells", "says"),
    [
        ((0.002, 0.001, 0.004), False, "entropy is lower on far than on near, AUROC 0.002 [0.001, 0.004]"),
        ((0.53, 0.5, 0.56), False, "entropy does not differ measurably between far and near"),
        ((0.47, 0.44, 0.5), False, "entropy does not differ measurably between far and near"),
        ((math.nan, math.nan, math.nan), False, "entropy has no AUROC of far against near"),
        ((0.8, 0.7, 0.9), True, "a tells far from near by entropy with AUROC 0.800 [0.700, 0.900]"),
    ],
)
def test_a_score_tells_domains_apart_only_where_its_interval_lies_above_chance(run, auroc, tells, says):
    found = {0: {"near": {"far": {"entropy": detection(*auroc)}}}}
    (said,) = sentences([Entry("a", run)], [], found)
    assert says in said
    assert ("tell" in said) == tells
