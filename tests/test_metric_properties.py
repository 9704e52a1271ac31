"""What has to hold for any predictions whatever."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lm_eval_lora_ensemble.metrics import information
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.calibration import (
    confidence_gap,
    expected_calibration_error,
    maximum_calibration_error,
    rms_calibration_error,
)
from lm_eval_lora_ensemble.metrics.choices import choice_probabilities
from lm_eval_lora_ensemble.metrics.conformal import METHODS, conformal_sets, split
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.recalibration import TemperatureScaling
from lm_eval_lora_ensemble.metrics.selection import risk_coverage

finite = st.floats(-40, 40)


@st.composite
def loglikelihoods(draw):
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(2, 5)))
    return draw(arrays.arrays(np.float64, shape, elements=finite))


@st.composite
def outcomes(draw):
    n = draw(st.integers(1, 60))
    confidence = draw(arrays.arrays(np.float64, n, elements=st.floats(0, 1)))
    return confidence, draw(arrays.arrays(np.bool_, n))


@given(loglikelihoods())
def test_information_is_ordered(ll):
    p = choice_probabilities(ll)
    mi, entropy = information.mutual_information(p), information.predictive_entropy(p)
    slack = 1e-9
    assert (mi >= -slack).all()
    assert (mi <= entropy + slack).all()
    assert (entropy <= np.log(ll.shape[2]) + slack).all()
    assert (mi <= np.log(ll.shape[0]) + slack).all()


@given(loglikelihoods(), st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(ll, random):
    order = list(range(len(ll)))
    random.shuffle(order)
    p = choice_probabilities(ll)
    assert np.allclose(
        information.mutual_information(p), information.mutual_information(p[order]), atol=1e-12
    )
    assert np.allclose(information.expected_entropy(p), information.expected_entropy(p[order]), atol=1e-12)


@given(loglikelihoods(), st.integers(2, 6))
def test_equal_members_have_no_mutual_information(ll, n):
    p = choice_probabilities(np.repeat(ll[:1], n, axis=0))
    assert np.allclose(information.mutual_information(p), 0, atol=1e-12)


@given(loglikelihoods(), st.floats(0.05, 20))
def test_temperature_keeps_the_most_probable_choice(ll, temperature):
    log_p = np.log(np.maximum(choice_probabilities(ll), 1e-300))
    scaled = TemperatureScaling(temperature)(log_p)
    chosen = log_p.argmax(axis=-1)[..., None]
    assert np.allclose(np.take_along_axis(scaled, chosen, -1)[..., 0], scaled.max(axis=-1), atol=1e-12)


@given(outcomes(), st.integers(1, 30), st.sampled_from(["width", "mass"]))
def test_calibration_errors_are_ordered_and_in_range(data, bins, binning):
    confidence, correct = data
    ece = expected_calibration_error(confidence, correct, bins, binning=binning)
    rms = rms_calibration_error(confidence, correct, bins, binning=binning)
    mce = maximum_calibration_error(confidence, correct, bins, binning=binning)
    slack = 1e-12
    assert -slack <= abs(confidence_gap(confidence, correct)) <= ece + slack
    assert ece <= rms + slack
    assert rms <= mce + slack
    assert mce <= 1 + slack


@given(outcomes())
def test_the_risk_coverage_curve_ends_at_the_error_rate(data):
    confidence, correct = data
    curve = risk_coverage(1 - confidence, ~correct)
    assert np.isclose(curve.risk[-1], 1 - correct.mean())
    assert np.isclose(curve.coverage[-1], 1)
    assert curve.excess_aurc >= -1e-12
    assert -1e-12 <= curve.aurc <= 1


@settings(max_examples=25, deadline=None)
@given(loglikelihoods(), st.integers(0, 2**31))
def test_the_order_of_documents_does_not_matter(ll, seed):
    rng = np.random.default_rng(seed)
    gold, order = rng.integers(ll.shape[2], size=ll.shape[1]), rng.permutation(ll.shape[1])
    predictions = Predictions.from_scores(ll, gold)
    every = np.ones((1, ll.shape[1]))
    one, other = Battery(predictions)(every), Battery(predictions.take(order))(every)
    for name, value in one.items():
        assert np.allclose(value, other[name], atol=1e-9, equal_nan=True), name


def test_conformal_sets_cover_as_promised_on_exchangeable_data():
    rng = np.random.default_rng(0)
    alpha, coverage = 0.2, {method: [] for method in METHODS}
    for seed in range(200):
        ll = rng.normal(size=(3, 120, 4)) * 2
        # a poor model: the gold answer follows the first member, sharpened
        odds = choice_probabilities(ll[0] * 0.5)
        gold = (odds.cumsum(1) > rng.uniform(size=(120, 1))).argmax(1)
        calibration, test = split(Predictions.from_scores(ll, gold), 0.5, seed)
        for method in METHODS:
            coverage[method].append(conformal_sets(calibration, test, method, alpha, seed=seed).coverage)
    for values in coverage.values():
        error = np.std(values) / len(values) ** 0.5
        assert np.mean(values) >= 1 - alpha - 3 * error
        assert np.mean(values) <= 1 - alpha + 1 / 61 + 3 * error
