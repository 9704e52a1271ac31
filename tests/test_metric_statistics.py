"""Intervals, conformal sets, detection, recalibration and ensemble size."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import ResamplingPlan, bootstrap, interval, mean_of
from lm_eval_lora_ensemble.metrics.choices import choice_probabilities
from lm_eval_lora_ensemble.metrics.conformal import conformal_sets, conformal_threshold, split
from lm_eval_lora_ensemble.metrics.detection import detect
from lm_eval_lora_ensemble.metrics.ensemble_size import by_size
from lm_eval_lora_ensemble.metrics.predictions import Predictions, check_same_documents
from lm_eval_lora_ensemble.metrics.recalibration import (
    fit_temperature,
    fit_vector,
    recalibrate,
)
from lm_eval_lora_ensemble.metrics.retention import retention


def make(seed=0, *, d=300, n=4, c=4, sharp=2.0, subjects=""):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(d, c)) * sharp
    gold = (choice_probabilities(base).cumsum(1) > rng.uniform(size=(d, 1))).argmax(1)
    return Predictions.from_scores(base + rng.normal(size=(n, d, c)), gold, subjects=subjects)


def mean_statistic(values):
    return lambda weights: {"mean": weights @ values / weights.sum(1)}


def test_bootstrap_is_scipys():
    values = np.random.default_rng(1).exponential(size=150)
    ours = bootstrap(mean_statistic(values), ResamplingPlan(150, resamples=20_000)).estimate("mean")
    for method, limits in (("percentile", ours.percentile), ("BCa", ours.bca), ("basic", ours.basic)):
        theirs = stats.bootstrap((values,), np.mean, method=method, n_resamples=20_000, rng=3)
        assert limits == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)
    assert ours.standard_error == pytest.approx(theirs.standard_error, rel=0.03)


def test_bca_is_scipys_formula_on_the_same_resamples():
    from scipy.stats import norm

    rng = np.random.default_rng(2)
    resampled, jackknife = rng.gamma(3, size=999), rng.gamma(2, size=50)
    found = interval(3.2, resampled, jackknife)
    influence = jackknife.mean() - jackknife
    a = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    z0 = norm.ppf(np.mean(resampled < 3.2))
    shares = [norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in norm.ppf([0.025, 0.975])]
    assert found.bca == pytest.approx(tuple(np.quantile(resampled, shares)))


def test_grouped_jackknife_keeps_the_acceleration():
    values = np.random.default_rng(3).exponential(size=4000)
    drawn = bootstrap(mean_statistic(values), ResamplingPlan(4000, resamples=2))
    assert len(drawn.jackknife["mean"]) == 200
    influence = drawn.jackknife["mean"].mean() - drawn.jackknife["mean"]
    grouped = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    exact = stats.skew(values) / (6 * 4000**0.5)
    assert grouped == pytest.approx(exact, abs=0.008)


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(4)
    hits = []
    for seed in range(200):
        estimate = bootstrap(
            mean_statistic(rng.exponential(size=80)), ResamplingPlan(80, 400, seed)
        ).estimate("mean")
        hits.append(estimate.bca[0] <= 1 <= estimate.bca[1])
    assert 0.88 <= np.mean(hits) <= 0.985


def test_same_seed_same_resamples_other_seed_others():
    values = np.arange(50.0)
    one, two, three = (bootstrap(mean_statistic(values), ResamplingPlan(50, 100, seed)) for seed in (1, 1, 2))
    assert np.array_equal(one.resampled["mean"], two.resampled["mean"])
    assert not np.array_equal(one.resampled["mean"], three.resampled["mean"])


def test_clusters_are_drawn_whole_and_strata_keep_their_size():
    clusters = np.repeat(list("abcdef"), [1, 2, 3, 4, 5, 6])
    for weights in ResamplingPlan(21, 50, clusters=clusters).draws():
        for label in "abcdef":
            assert (np.ptp(weights[:, clusters == label], axis=1) == 0).all()
    strata = np.repeat([0, 1], [5, 16])
    for weights in ResamplingPlan(21, 50, strata=strata).draws():
        assert (weights[:, :5].sum(1) == 5).all()
        assert (weights[:, 5:].sum(1) == 16).all()


def test_clustering_widens_the_interval_of_alike_documents():
    values = np.repeat(np.random.default_rng(0).normal(size=30), 20)
    clusters = np.repeat(np.arange(30), 20)
    alone = bootstrap(mean_statistic(values), ResamplingPlan(600, 500)).estimate("mean")
    whole = bootstrap(mean_statistic(values), ResamplingPlan(600, 500, clusters=clusters)).estimate("mean")
    assert whole.standard_error > 3 * alone.standard_error


def test_a_paired_difference_is_narrower_than_its_parts():
    predictions = make()
    plan = ResamplingPlan(300, 300)
    ensemble = bootstrap(Battery(predictions), plan)
    members = mean_of([bootstrap(Battery(predictions.only([m])), plan) for m in range(4)])
    difference = ensemble.minus(members).estimate("nll")
    assert difference.value == pytest.approx(ensemble.value["nll"] - members.value["nll"])
    assert difference.standard_error < 0.5 * ensemble.estimate("nll").standard_error
    with pytest.raises(EnsembleError, match="same resamples"):
        ensemble.minus(bootstrap(Battery(predictions), ResamplingPlan(300, 300, seed=1)))


def test_an_interval_that_bias_would_fake_is_not_given_as_bca():
    resampled = np.random.default_rng(0).normal(2.0, 0.5, size=1000)
    found = interval(0.0, resampled, np.zeros(10))
    assert math.isnan(found.bca[0])
    assert found.quoted[2] == "basic"
    assert found.bias == pytest.approx(2, abs=0.1)


def test_an_undefined_value_has_no_interval():
    found = interval(float("nan"), np.full(10, np.nan), np.full(5, np.nan))
    assert math.isnan(found.standard_error)
    assert all(math.isnan(limit) for limit in (*found.percentile, *found.basic, *found.bca))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": 0}, "no document"),
        ({"documents": 5, "resamples": 1}, "at least 2"),
        ({"documents": 5, "level": 1.0}, "between 0 and 1"),
        ({"documents": 5, "clusters": np.zeros(4)}, "one label"),
    ],
)
def test_a_bad_plan_is_refused(arguments, message):
    with pytest.raises(EnsembleError, match=message):
        ResamplingPlan(**arguments)


def test_conformal_threshold_is_the_conservative_quantile():
    scores = np.arange(1.0, 20.0)
    assert conformal_threshold(scores, 0.1) == 18.0
    assert conformal_threshold(scores, 0.05) == 19.0
    assert conformal_threshold(scores, 0.04) == math.inf


def test_conformal_scores_are_the_definition_in_a_loop():
    predictions = make(d=60)
    calibration, test = split(predictions)
    for method in ("thr", "aps", "raps"):
        found = conformal_sets(calibration, test, method, seed=5, penalty=0.1, free_ranks=1)
        rng = np.random.default_rng(5)
        scores = []
        for part in (calibration, test):
            u = rng.uniform(size=(part.n_documents, 1)) if method != "thr" else None
            rows = np.zeros((part.n_documents, 4))
            for d, p in enumerate(part.mixture):
                for c in range(4):
                    before = p[p > p[c]]
                    if method == "thr":
                        rows[d, c] = 1 - p[c]
                    else:
                        rows[d, c] = before.sum() + u[d, 0] * p[c]
                        rows[d, c] += 0.1 * max(0, len(before) + 1 - 1) if method == "raps" else 0
            scores.append(rows)
        threshold = conformal_threshold(scores[0][np.arange(30), calibration.is_gold.argmax(1)], 0.1)
        assert found.threshold == pytest.approx(threshold)
        assert (found.sets == (scores[1] <= threshold + 1e-12)).mean() > 0.99
        assert found.mean_size == found.sets.sum(1).mean()


def test_padding_never_enters_a_conformal_set():
    rng = np.random.default_rng(0)
    counts = rng.integers(3, 6, 100)
    ll = np.where(np.arange(5) >= counts[:, None], -np.inf, rng.normal(size=(2, 100, 5)))
    predictions = Predictions.from_scores(ll, rng.integers(0, counts), counts=counts)
    few = predictions.take(np.arange(3))
    everything = conformal_sets(few, predictions, "thr", 0.05)
    assert everything.threshold == math.inf
    assert np.array_equal(everything.sizes, counts)
    assert everything.coverage == 1


def test_detection_is_sklearns_and_higher_means_out():
    metrics = pytest.importorskip("sklearn.metrics")
    inside, outside = make(0, sharp=3), make(1, d=200, sharp=0.5)
    found = detect(inside, outside, resamples=50)
    assert set(found) == {"max_probability", "entropy", "expected_entropy", "mutual_information"}
    truth = np.repeat([0, 1], [300, 200])
    score = 1 - np.concatenate([inside.mixture.max(1), outside.mixture.max(1)])
    assert found["max_probability"].auroc.value == pytest.approx(metrics.roc_auc_score(truth, score))
    assert found["max_probability"].aupr.value == pytest.approx(metrics.average_precision_score(truth, score))
    assert found["entropy"].auroc.value > 0.6
    assert "mutual_information" not in detect(inside.only([0]), outside.only([0]), resamples=2)
    with pytest.raises(EnsembleError, match="two ensembles"):
        detect(inside, outside.only([0]))


def test_detection_draws_a_groups_tasks_as_a_whole():
    parts = [make(seed, d=40, sharp=0.3 + seed, subjects=str(seed)) for seed in range(6)]
    inside, outside = Predictions.concatenate(parts[:3]), Predictions.concatenate(parts[3:])
    whole = detect(inside, outside, resamples=300)["entropy"].auroc
    one_task = [replace(side, subjects=np.full(120, "one")) for side in (inside, outside)]
    by_document = detect(*one_task, resamples=300)["entropy"].auroc
    assert whole.value == by_document.value
    assert whole.standard_error > 2 * by_document.standard_error
    mixed = detect(inside, one_task[1], resamples=300)[
        "entropy"
    ].auroc  # documents of the one, tasks of the other
    assert mixed.standard_error > 1.5 * by_document.standard_error


def test_documents_surer_than_a_float_beside_one_keep_their_order():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    gaps = draw.uniform(5, 120, size=200)
    wrong = draw.uniform(size=200) < 1 / gaps
    scores = np.stack([gaps, np.zeros(200)], axis=1)
    predictions = Predictions.from_scores(scores, wrong.astype(int))
    assert (predictions.confidence == 1).sum() > 100
    assert predictions.least_confidence == pytest.approx(np.exp(-gaps), rel=2e-2)
    found = Battery(predictions)(np.ones((1, 200)))
    expected = metrics.roc_auc_score(wrong, -gaps)
    assert found["error_auroc_max_probability"][0] == pytest.approx(expected)
    assert found["error_auroc_entropy"][0] == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_one_document_has_a_value_and_no_interval():
    one = make(d=1)
    plan = ResamplingPlan(1, 20)
    whole, member = (bootstrap(Battery(p), plan) for p in (one, one.member(0)))
    for estimate in (whole.estimate("nll"), whole.minus(member).estimate("nll")):
        assert np.isfinite(estimate.value)
        assert np.isnan([estimate.standard_error, *estimate.quoted[:2]]).all()


def test_the_temperature_is_a_general_optimisers():
    predictions = make(n=1)
    log_p, gold = predictions.log_mixture * 2.5, predictions.is_gold.argmax(1)
    found = fit_temperature(log_p, gold)

    def loss(inverse):
        return -np.log(choice_probabilities(log_p * inverse[0])[np.arange(len(gold)), gold]).mean()

    best = optimize.minimize(loss, [1.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-14})
    assert found.temperature == pytest.approx(1 / best.x[0], rel=1e-3)
    assert not found.at_limit


def test_a_temperature_without_an_optimum_says_so():
    log_p = np.log([[0.9, 0.1], [0.8, 0.2]])
    assert fit_temperature(log_p, np.array([0, 0])).at_limit
    assert fit_temperature(log_p, np.array([1, 1])).at_limit


def test_vector_scaling_mends_a_bias_towards_a_letter():
    predictions = make(n=1, d=2000)
    biased = predictions.with_log_probabilities(
        np.log(choice_probabilities(predictions.log_probabilities + np.array([2.0, 0, 0, 0])))
    )
    calibration, test = split(biased)
    vector = recalibrate(calibration, test, how="vector").predictions
    scalar = recalibrate(calibration, test).predictions
    every = np.ones((1, test.n_documents))
    before, with_t, with_v = (Battery(p)(every)["nll"][0] for p in (test, scalar, vector))
    assert with_v < with_t <= before + 0.01
    with pytest.raises(EnsembleError, match="same choices"):
        fit_vector(np.array([[0.0, -np.inf]]), np.array([0]))


def test_orders_of_pooling_and_calibrating():
    calibration, test = make(0, d=1500), make(1, d=1500)
    every = np.ones((1, 1500))
    nll = {"none": Battery(test)(every)["nll"][0]}
    for order in ("pool_then_calibrate", "calibrate_then_pool", "shared_then_pool"):
        found = recalibrate(calibration, test, order)
        nll[order] = Battery(found.predictions)(every)["nll"][0]
        assert found.predictions.n_members == (1 if order == "pool_then_calibrate" else 4)
        assert len(found.scalings) == (4 if order == "calibrate_then_pool" else 1)
    assert nll["shared_then_pool"] <= nll["calibrate_then_pool"]
    pooled = recalibrate(calibration, test).predictions
    assert np.array_equal(pooled.correct, test.correct)
    with pytest.raises(EnsembleError, match="not offered"):
        recalibrate(calibration, test, "shared_then_pool", how="vector")


def test_size_rows_are_means_over_subsets():
    predictions = make(d=100)
    rows = by_size(predictions)
    assert [(r.members, r.subsets, r.exhaustive) for r in rows] == [
        (1, 4, True),
        (2, 6, True),
        (3, 4, True),
        (4, 1, True),
    ]
    every = np.ones((1, 100))
    single = [Battery(predictions.only([m]))(every)["nll"][0] for m in range(4)]
    assert rows[0].mean["nll"] == pytest.approx(np.mean(single))
    assert rows[0].spread["nll"] == pytest.approx(np.std(single, ddof=1))
    # Jensen: the loss of a mean is at most the mean loss
    assert [r.mean["nll"] for r in rows] == sorted((r.mean["nll"] for r in rows), reverse=True)
    assert math.isnan(rows[-1].spread["nll"])
    sampled = by_size(predictions, max_subsets=3)
    assert [(r.subsets, r.exhaustive) for r in sampled] == [(3, False), (3, False), (3, False), (1, True)]


def test_paired_comparison_refuses_other_documents():
    a = make(0)
    check_same_documents(a, a.only([0]))
    with pytest.raises(EnsembleError, match="300 against 299"):
        check_same_documents(a, a.take(np.arange(299)))
    with pytest.raises(EnsembleError, match="number 0 is"):
        check_same_documents(a, a.take(np.arange(300)[::-1]))


def test_a_selection_of_documents_is_the_same_whatever_it_was_selected_from():
    """ARC has documents of three and of five choices: the first few may lack the column that all together need."""
    scores = np.random.default_rng(0).normal(size=(1, 4, 5))
    scores[:, [0, 1, 2, 2], [4, 4, 3, 4]] = -np.inf
    wide = Predictions.from_scores(scores, [0, 1, 2, 4], counts=[4, 4, 3, 5])
    narrow = Predictions.from_scores(scores[:, :3, :4], [0, 1, 2], counts=[4, 4, 3])
    assert wide.take([0, 1, 2]).mixture.shape == wide.take([True, True, True, False]).mixture.shape == (3, 4)
    found = retention(wide.take([0, 1, 2]), narrow)(np.ones((1, 3)))
    assert found["total_variation"] == pytest.approx(0)
    assert found["kl_to_prior"] == pytest.approx(0, abs=1e-12)
