"""Every metric against somebody else's answer, or against the definition written out as a loop."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics import calibration, choices, disagreement, information
from lm_eval_lora_ensemble.metrics import proper_scores as scores
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import ResamplingPlan
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores
from lm_eval_lora_ensemble.metrics.classwise import brier_decomposition, classwise_calibration_error
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.ranking import auroc, average_precision, false_positive_rate_at
from lm_eval_lora_ensemble.metrics.recalibration import fit_shared_temperature, fit_temperature, fit_vector
from lm_eval_lora_ensemble.metrics.registry import METRICS
from lm_eval_lora_ensemble.metrics.selection import accuracy_at_coverage, coverage_at_risk, risk_coverage


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def ragged(rng):
    """Five members, 200 documents of three to five choices."""
    counts = rng.integers(3, 6, 200)
    ll = rng.normal(size=(5, 200, 5)) * 2
    ll[:, np.arange(5) >= counts[:, None]] = -np.inf
    return Predictions.from_scores(ll, rng.integers(0, counts), counts=counts)


def graded(rng, n, digits=None):
    confidence = rng.uniform(0.2, 1, n)
    if digits is not None:
        confidence = confidence.round(digits)
    return confidence, rng.uniform(size=n) < confidence**1.5


def test_softmax_is_scipys_also_far_from_zero(rng):
    ll = rng.normal(size=(3, 7, 4)) * 50 - 700
    assert np.allclose(choices.choice_probabilities(ll), special.softmax(ll, axis=-1), atol=1e-15)
    assert np.allclose(choices.log_choice_probabilities(ll), special.log_softmax(ll, axis=-1))


def test_other_class_takes_what_the_letters_leave():
    p = choices.with_other_class(np.log([[0.5, 0.2], [0.6, 0.4]]))
    assert np.allclose(p, [[0.5, 0.2, 0.3], [0.6, 0.4, 0.0]])
    with pytest.raises(EnsembleError, match=r"sum to 1\.1"):
        choices.with_other_class(np.log([[0.7, 0.4]]))


@pytest.mark.parametrize("bins", [1, 10, 15, 20])
@pytest.mark.parametrize(
    ("ours", "norm"),
    [
        (calibration.expected_calibration_error, "l1"),
        (calibration.rms_calibration_error, "l2"),
        (calibration.maximum_calibration_error, "max"),
    ],
)
def test_calibration_errors_are_torchmetrics(rng, bins, ours, norm):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.classification")
    confidence, correct = graded(rng, 500)
    theirs = functional.binary_calibration_error(
        torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct).long(), n_bins=bins, norm=norm
    )
    assert ours(confidence, correct, bins) == pytest.approx(float(theirs), abs=1e-6)


def test_bins_close_on_the_right_and_zero_belongs_to_the_first():
    rows = calibration.reliability_table([0.0, 0.5, 0.50001, 1.0], [0, 1, 1, 1], bins=2)
    assert [row.n for row in rows] == [2, 2]


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_binned_errors_are_the_definition_in_a_loop(rng, binning):
    confidence, correct = graded(rng, 300, digits=2)
    edges = calibration.bin_edges(confidence, 10, binning)
    l1 = l2 = debiased = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if (n := inside.sum()) == 0:
            continue
        acc, conf = correct[inside].mean(), confidence[inside].mean()
        l1 += n / 300 * abs(acc - conf)
        l2 += n / 300 * (acc - conf) ** 2
        if n > 1:
            debiased += n / 300 * ((acc - conf) ** 2 - acc * (1 - acc) / (n - 1))
    assert calibration.expected_calibration_error(confidence, correct, 10, binning=binning) == pytest.approx(
        l1
    )
    assert calibration.rms_calibration_error(confidence, correct, 10, binning=binning) == pytest.approx(
        l2**0.5
    )
    assert calibration.debiased_squared_calibration_error(
        confidence, correct, 10, binning=binning
    ) == pytest.approx(debiased)


def test_equal_mass_bins_hold_equally_many(rng):
    confidence, correct = graded(rng, 300)
    table = calibration.reliability_table(confidence, correct, 15, binning="mass")
    assert {row.n for row in table} == {20}


def test_debiasing_centres_a_calibrated_model_on_zero():
    rng = np.random.default_rng(0)
    plain, debiased = [], []
    for _ in range(300):
        confidence = rng.uniform(size=200)
        correct = rng.uniform(size=200) < confidence
        plain.append(calibration.rms_calibration_error(confidence, correct) ** 2)
        debiased.append(calibration.debiased_squared_calibration_error(confidence, correct))
    assert abs(np.mean(debiased)) < 4 * np.std(debiased) / 300**0.5
    assert np.mean(plain) > 0.008


def test_reliability_interval_is_scipys_wilson(rng):
    confidence, correct = graded(rng, 200)
    for row in calibration.reliability_table(confidence, correct, 8):
        if row.n:
            wilson = stats.binomtest(round(row.accuracy * row.n), row.n).proportion_ci(method="wilson")
            assert (row.accuracy_low, row.accuracy_high) == pytest.approx((wilson.low, wilson.high))
        else:
            assert math.isnan(row.accuracy)


def test_nll_and_brier_are_sklearns(rng):
    metrics = pytest.importorskip("sklearn.metrics")
    p, gold = rng.dirichlet(np.ones(4), 100), rng.integers(4, size=100)
    assert scores.negative_loglikelihood(p, gold).mean() == pytest.approx(metrics.log_loss(gold, p))
    by_hand = [sum((p[d, c] - (c == gold[d])) ** 2 for c in range(4)) for d in range(100)]
    assert scores.brier_score(p, gold) == pytest.approx(by_hand)
    two = rng.uniform(size=100)
    binary = rng.integers(2, size=100)
    ours = scores.brier_score(np.stack([1 - two, two], 1), binary).mean()
    assert ours == pytest.approx(2 * metrics.brier_score_loss(binary, two))


def test_classwise_error_is_the_mean_of_binary_ones(ragged):
    p, gold, counts = ragged.mixture, ragged.is_gold.argmax(1), ragged.counts
    each = [
        calibration.expected_calibration_error(p[counts > c, c], gold[counts > c] == c, 15) for c in range(5)
    ]
    assert classwise_calibration_error(p, gold, counts=counts) == pytest.approx(np.mean(each))


@pytest.mark.parametrize("debiased", [False, True])
def test_brier_decomposition_adds_up(ragged, debiased):
    parts = brier_decomposition(
        ragged.mixture, ragged.is_gold.argmax(1), 10, counts=ragged.counts, debiased=debiased
    )
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin
    assert total == pytest.approx(scores.brier_score(ragged.mixture, ragged.is_gold.argmax(1)).mean())


def test_brier_decomposition_has_no_remainder_for_constant_bins(rng):
    level = rng.choice([0.1, 0.3, 0.5, 0.9], 400)
    p, gold = np.stack([level, 1 - level], 1), (rng.uniform(size=400) > level**2).astype(int)
    parts = brier_decomposition(p, gold, 10)
    assert parts.within_bin == pytest.approx(0, abs=1e-12)
    rel = sum((level == x).mean() * (x - (gold[level == x] == 0).mean()) ** 2 for x in set(level))
    base = (gold == 0).mean()
    res = sum((level == x).mean() * ((gold[level == x] == 0).mean() - base) ** 2 for x in set(level))
    assert parts.reliability == pytest.approx(2 * rel)
    assert parts.resolution == pytest.approx(2 * res)
    assert parts.uncertainty == pytest.approx(2 * base * (1 - base))


def test_entropies_are_scipys(ragged):
    p = ragged.probabilities
    assert information.predictive_entropy(p) == pytest.approx(stats.entropy(p.mean(0), axis=-1))
    assert information.expected_entropy(p) == pytest.approx(stats.entropy(p, axis=-1).mean(0))
    kl_to_mean = special.rel_entr(p, p.mean(0)).sum(-1).mean(0)
    assert information.mutual_information(p) == pytest.approx(kl_to_mean, abs=1e-12)


def test_mutual_information_of_opposed_and_of_equal_members():
    opposed = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert information.mutual_information(opposed) == pytest.approx(math.log(2))
    assert information.mutual_information(np.repeat(opposed[:1], 3, 0)) == pytest.approx(0, abs=1e-15)


def test_disagreement_is_the_definition_in_a_loop(ragged):
    p = ragged.probabilities
    n, d, _ = p.shape
    for doc in range(0, d, 20):
        votes = [int(np.argmax(p[m, doc])) for m in range(n)]
        assert disagreement.variation_ratio(p)[doc] == pytest.approx(1 - max(map(votes.count, votes)) / n)
        pairs = list(itertools.combinations(range(n), 2))
        same = np.mean([votes[i] == votes[j] for i, j in pairs])
        assert disagreement.pairwise_agreement(p)[doc] == pytest.approx(same)
        tv = np.mean([np.abs(p[i, doc] - p[j, doc]).sum() / 2 for i, j in pairs])
        assert disagreement.pairwise_total_variation(p)[doc] == pytest.approx(tv)
        c = ragged.counts[doc]
        kl = np.mean(
            [stats.entropy(p[i, doc, :c], p[j, doc, :c]) for i, j in itertools.permutations(range(n), 2)]
        )
        assert disagreement.pairwise_kl(p)[doc] == pytest.approx(kl)
    assert np.isnan(disagreement.pairwise_kl(p[:1])).all()


@pytest.mark.parametrize("digits", [1, 3, 15])
def test_ranking_metrics_are_sklearns_with_ties(rng, digits):
    metrics = pytest.importorskip("sklearn.metrics")
    positive = rng.uniform(size=400) < 0.3
    score = (rng.normal(size=400) + positive).round(digits)
    assert auroc(score, positive) == pytest.approx(metrics.roc_auc_score(positive, score))
    assert average_precision(score, positive) == pytest.approx(
        metrics.average_precision_score(positive, score)
    )
    fpr, tpr, _ = metrics.roc_curve(positive, score, drop_intermediate=False)
    assert false_positive_rate_at(score, positive) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


def test_ranking_of_one_class_is_nan():
    assert math.isnan(auroc([1.0, 2.0], [1, 1]))
    assert math.isnan(average_precision([1.0, 2.0], [0, 0]))
    assert math.isnan(false_positive_rate_at([1.0, 2.0], [0, 0]))


def test_risk_coverage_is_the_definition_in_a_loop(rng):
    uncertainty, error = rng.normal(size=200), rng.uniform(size=200) < 0.3
    ordered = error[np.argsort(uncertainty)]
    risks = [ordered[:k].mean() for k in range(1, 201)]
    best = np.sort(error)
    found = risk_coverage(uncertainty, error)
    assert found.aurc == pytest.approx(np.mean(risks))
    assert found.excess_aurc == pytest.approx(
        np.mean(risks) - np.mean([best[:k].mean() for k in range(1, 201)])
    )
    assert found.risk == pytest.approx(risks)
    for coverage in (0.5, 0.8, 0.903, 1.0):
        k = math.ceil(coverage * 200)
        assert accuracy_at_coverage(uncertainty, error, coverage) == pytest.approx(1 - risks[k - 1])
    for risk in (0.0, 0.05, 0.2):
        good = [k for k in range(1, 201) if risks[k - 1] <= risk]
        assert coverage_at_risk(uncertainty, error, risk) == pytest.approx(max(good, default=0) / 200)


def test_ties_in_risk_coverage_are_the_mean_over_all_orders():
    uncertainty, error = np.array([0, 1, 1, 1, 2, 2]), np.array([0, 1, 0, 0, 1, 0])
    areas, accuracies = [], []
    for order in itertools.permutations(range(6)):
        if (np.diff(uncertainty[list(order)]) >= 0).all():
            errors = error[list(order)]
            areas.append(np.mean([errors[:k].mean() for k in range(1, 7)]))
            accuracies.append(1 - errors[:3].mean())
    assert risk_coverage(uncertainty, error).aurc == pytest.approx(np.mean(areas))
    assert accuracy_at_coverage(uncertainty, error, 0.5) == pytest.approx(np.mean(accuracies))


def test_battery_reports_every_metric_as_the_plain_functions_do(ragged):
    found = {name: float(v[0]) for name, v in Battery(ragged)(np.ones((1, 200))).items()}
    assert list(found) == list(METRICS)
    p, error = ragged.probabilities, ~ragged.correct
    entropy = information.predictive_entropy(p)
    expected = {
        "accuracy": (p.mean(0).argmax(1) == ragged.is_gold.argmax(1)).mean(),
        "nll": scores.negative_loglikelihood(p.mean(0), ragged.is_gold.argmax(1)).mean(),
        "ece": calibration.expected_calibration_error(ragged.confidence, ragged.correct),
        "confidence_gap": calibration.confidence_gap(ragged.confidence, ragged.correct),
        "classwise_ece": classwise_calibration_error(
            ragged.mixture, ragged.is_gold.argmax(1), counts=ragged.counts
        ),
        "mutual_information_normalised": (information.mutual_information(p) / np.log(ragged.counts)).mean(),
        "error_auroc_entropy": auroc(entropy, error),
        "error_aupr_entropy": average_precision(entropy, error),
        "aurc_entropy": risk_coverage(entropy, error).aurc,
        "coverage_at_5_risk": coverage_at_risk(1 - ragged.confidence, error),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_weights_mean_repetition(ragged, rng):
    weights = rng.integers(0, 4, 200)
    repeated = ragged.take(np.repeat(np.arange(200), weights))
    weighted = Battery(ragged)(weights[None].astype(float))
    copied = Battery(repeated)(np.ones((1, repeated.n_documents)))
    quantile_bins = {"ece_equal_mass"}  # its edges come from the sample that is given
    for name in set(METRICS) - quantile_bins:
        assert weighted[name][0] == pytest.approx(copied[name][0]), name


def test_a_single_member_has_no_disagreement_to_report(ragged):
    found = Battery(ragged.only([2]))(np.ones((1, 200)))
    assert abs(found["mutual_information"][0]) < 1e-12
    for name in (
        "pairwise_kl",
        "pairwise_agreement",
        "error_auroc_mutual_information",
        "aurc_mutual_information",
    ):
        assert np.isnan(found[name][0])


BAD = np.array([[0.5, 0.6], [0.5, 0.5]])
GOOD = np.array([[0.4, 0.6], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.brier_score(BAD, [0, 1]), "sums to 1.1 at index"),
        (lambda: scores.brier_score(-BAD, [0, 1]), r"lie in \[0, 1\]"),
        (lambda: information.entropy([np.nan, 1.0]), "NaN"),
        (lambda: scores.brier_score(GOOD, [0, 2]), "gold is 2 at document 1"),
        (lambda: scores.brier_score(GOOD, [0, -100]), "gold is -100"),
        (lambda: scores.brier_score(GOOD, [0.0, 1.0]), "has shape .2,. and type float64"),
        (lambda: scores.brier_score(GOOD, [0]), "gold has shape"),
        (lambda: scores.brier_score([[1.0], [1.0]], [0, 0]), "at least two choices"),
        (lambda: calibration.expected_calibration_error([], []), "no document"),
        (lambda: calibration.expected_calibration_error([1.2], [1]), "outside"),
        (lambda: calibration.expected_calibration_error([0.5], [2]), "0 and 1 only"),
        (lambda: calibration.expected_calibration_error([0.5], [1], bins=0), "at least one bin"),
        (lambda: choices.choice_probabilities([[np.nan, 0]]), "nan at index"),
        (lambda: choices.choice_probabilities([[0, 1], [-np.inf, -np.inf]]), "every choice"),
        (lambda: choices.choice_probabilities([[0, 1], [2]]), "rectangular"),
        (lambda: auroc([np.nan, 1], [0, 1]), "NaN at document 0"),
        (lambda: disagreement.total_variation(GOOD, GOOD[:1]), "same documents"),
        (lambda: Predictions.from_scores(np.zeros((2, 3, 1)), [0, 0, 0]), "choices"),
        (lambda: Predictions.from_scores(np.zeros((1, 0, 4)), []), "empty"),
        (lambda: Predictions.from_scores(np.zeros((1, 2, 4)), [0, 2], counts=[4, 3]), "beyond"),
        (lambda: Predictions.from_scores(np.zeros((1, 2, 4)), None).correct, "gold answers are needed"),
        (lambda: Battery(Predictions.from_scores(np.zeros((1, 2, 4)), None)), "not given"),
        (lambda: Predictions.from_scores(np.zeros((2, 2, 4)), [0, 1]).only([2]), "there are 0 to 1"),
        (
            lambda: Predictions.from_scores(np.zeros((2, 2, 4)), [0, 1]).only(np.array([0, 2])),
            "there are 0 to 1",
        ),
        (lambda: Predictions.from_scores(np.zeros((2, 2, 4)), [0, 1]).take([]), "no document was selected"),
        (lambda: Predictions.concatenate(iter(())), "no task to pool"),
        (
            lambda: Predictions.from_scores(np.zeros((1, 2, 4)), [0, 1], counts=[3.9, 3.2]),
            "one whole number for each",
        ),
        (
            lambda: Predictions.from_scores(np.zeros((1, 2, 4)), [0, 1], subjects=["a", "b", "c"]),
            "one label, or one",
        ),
        (lambda: ChoiceScores.of(np.zeros((2, 2, 4))).only([-1]), "there are 0 to 1"),
        (lambda: ChoiceScores.of(np.zeros((2, 2, 4))).only([]), "there are 0 to 1"),
        (
            lambda: calibration.expected_calibration_error([0.5], [1], binning="uniform"),
            "use one of width, mass",
        ),
        (lambda: calibration.expected_calibration_error([0.5], [1], bins=10**9), "at most 100,000"),
        (lambda: calibration.expected_calibration_error([0.5], [1], bins=1.5), "give a whole number"),
        (lambda: classwise_calibration_error([[0.5, 0.3, 0.2]], [0], counts=[2]), "probability beyond them"),
        (lambda: classwise_calibration_error([[0.5, 0.5]], [0], counts=[4]), "counts is 4 at document 0"),
        (lambda: information.entropy(np.ma.array(GOOD, mask=[[0, 0], [1, 1]])), "masked entries"),
        (lambda: information.entropy([["a", "b"]]), "not a rectangular array of numbers"),
        (lambda: information.entropy([[0.5 + 0j, 0.5]]), "its type is complex128"),
        (
            lambda: information.entropy(torch.tensor([[0.5, 0.5]], dtype=torch.bfloat16)),
            r"\.detach\(\)\.float\(\)",
        ),
        (
            lambda: information.entropy(torch.tensor([[0.5, 0.5]], requires_grad=True)),
            r"\.detach\(\)\.float\(\)",
        ),
        (
            lambda: Battery(Predictions.from_scores(np.zeros((1, 2, 4)), [0, 1]), metrics=["nlll"]),
            "did you mean nll",
        ),
        (lambda: ResamplingPlan(3, seed=-1), "seed is -1"),
        (lambda: fit_vector([[-1.0], [-1.0, -2.0]], [0, 0]), "log_p is not a rectangular array"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(EnsembleError, match=message):
        call()


def test_lists_are_as_good_as_arrays(rng):
    log_p, gold = np.log(rng.dirichlet(np.ones(3), size=20)), rng.integers(3, size=20)
    assert fit_temperature(log_p.tolist(), gold) == fit_temperature(log_p, gold)
    assert fit_shared_temperature([log_p.tolist()] * 2, gold) == fit_shared_temperature(
        np.stack([log_p] * 2), gold
    )
    assert np.array_equal(fit_vector(log_p.tolist(), gold).slope, fit_vector(log_p, gold).slope)
    object_of_numbers = np.array([[0.5, 0.5]], dtype=object)
    assert information.entropy(object_of_numbers) == pytest.approx(np.log(2))
