"""One temperature for all members: against scipy on the plain loss, and what has to hold for any scores."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import optimize, special

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.temperature import TEMPERATURE_RANGE, fit_temperature_of_mixture


def plain_loss(scores, is_gold, temperature):
    """The definition, written out."""
    p = special.softmax(scores / temperature, axis=-1).mean(axis=0)
    return -np.log(np.maximum((p * is_gold).sum(axis=-1), 1e-300)).mean()


def best(scores, is_gold):
    """Least of scipy's local minima between many starts: the loss need not be unimodal."""
    edges = np.linspace(*np.log(TEMPERATURE_RANGE), 25)
    found = [
        optimize.minimize_scalar(
            lambda t: plain_loss(scores, is_gold, np.exp(t)), bounds=pair, method="bounded",
            options={"xatol": 1e-10},
        )
        for pair in itertools.pairwise(edges)
    ]  # fmt: skip
    return min(found, key=lambda one: one.fun)


def drawn(seed, temperature, members=4, documents=400, choices=4):
    """Scores, and answers drawn from their mixture at that temperature."""
    draw = np.random.default_rng(seed)
    scores = 3 * draw.normal(size=(1, documents, choices)) + draw.normal(size=(members, documents, choices))
    scores *= temperature / 2
    p = special.softmax(scores / temperature, axis=-1).mean(axis=0)
    gold = [draw.choice(choices, p=row) for row in p]
    return scores, np.eye(choices, dtype=bool)[gold]


@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 1.0, 3.0, 10.0]), st.booleans())
def test_the_fit_is_the_least_of_the_plain_loss(seed, temperature, several):
    scores, is_gold = drawn(seed, temperature, documents=60)
    scores[:, ::3, -1] = np.where(is_gold[::3, -1], scores[:, ::3, -1], -np.inf)  # ragged
    if several:
        is_gold[::2, 0] = True
    fit, reference = fit_temperature_of_mixture(scores, is_gold), best(scores, is_gold)
    assert plain_loss(scores, is_gold, fit.temperature) <= reference.fun + 2e-9
    if not fit.at_limit:
        assert np.log(fit.temperature) == pytest.approx(reference.x, abs=1e-4)
    assert fit.documents == 60


def test_a_gold_out_of_one_members_reach_counts_with_the_others_mass():
    scores, is_gold = drawn(5, 1.0, members=3, documents=50)
    is_gold[:, 0] = True
    scores[0][is_gold] = -np.inf
    scores[0, :, 1:][is_gold[:, 1:].all(axis=1)] = 0.0
    keep = np.isfinite(scores[0]).any(axis=1)
    fit = fit_temperature_of_mixture(scores[:, keep], is_gold[keep])
    assert np.log(fit.temperature) == pytest.approx(best(scores[:, keep], is_gold[keep]).x, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.05, 0.4, 1.0, 2.5, 8.0])
def test_a_known_temperature_is_recovered_within_its_error(temperature):
    z = []
    for seed in range(30):
        fit = fit_temperature_of_mixture(*drawn(seed, temperature))
        assert 0 < fit.standard_error < 0.2
        z.append((np.log(fit.temperature) - np.log(temperature)) / fit.standard_error)
    assert np.abs(z).max() < 3.5
    assert 0.6 < np.std(z) < 1.4  # the error is neither too small nor too large


def test_the_error_is_the_spread_over_resamples_though_no_temperature_makes_the_model_right():
    scores, is_gold = drawn(1, 1.0, documents=300)
    scores = np.sign(scores) * np.abs(scores) ** 1.7
    draw = np.random.default_rng(0)
    picks = draw.integers(0, 300, size=(300, 300))
    spread = np.std([np.log(fit_temperature_of_mixture(scores[:, i], is_gold[i]).temperature) for i in picks])
    assert fit_temperature_of_mixture(scores, is_gold).standard_error == pytest.approx(spread, rel=0.2)


@given(st.integers(0, 10**6), st.floats(-200, 200), st.floats(0.1, 10))
def test_constants_change_nothing_and_a_unit_scales_the_temperature(seed, constant, unit):
    scores, is_gold = drawn(seed, 1.0, documents=40)
    fit = fit_temperature_of_mixture(scores, is_gold)
    assume(not fit.at_limit)
    shift = constant * np.random.default_rng(seed).normal(size=(1, 40, 1))
    moved = fit_temperature_of_mixture(scores + shift, is_gold)
    assert np.log(moved.temperature) == pytest.approx(np.log(fit.temperature), abs=1e-5)
    scaled = fit_temperature_of_mixture(unit * scores, is_gold)
    assume(not scaled.at_limit)
    assert np.log(scaled.temperature) == pytest.approx(np.log(unit * fit.temperature), abs=1e-5)
    assert scaled.standard_error == pytest.approx(fit.standard_error, rel=1e-3)


def test_limits_are_flagged_and_have_no_error():
    scores, is_gold = drawn(3, 1.0)
    right = np.eye(4, dtype=bool)[scores.sum(axis=0).argmax(axis=-1)]
    one = scores[:1]
    all_right = fit_temperature_of_mixture(one, np.eye(4, dtype=bool)[one[0].argmax(axis=-1)])
    assert (all_right.temperature, all_right.at_limit) == (TEMPERATURE_RANGE[0], True)
    wrong = fit_temperature_of_mixture(-scores, right)
    assert (wrong.temperature, wrong.at_limit) == (TEMPERATURE_RANGE[1], True)
    every = fit_temperature_of_mixture(scores, np.ones_like(is_gold))
    assert every.at_limit  # every temperature is as good
    assert np.isnan([all_right.standard_error, wrong.standard_error, every.standard_error]).all()


def test_scores_that_say_nothing_are_chance_and_not_certainty():
    fitted = fit_temperature_of_mixture(np.zeros((1, 400, 4)), np.eye(4, dtype=bool)[np.arange(400) % 4])
    assert (fitted.temperature, fitted.at_limit) == (TEMPERATURE_RANGE[1], True)


def test_one_answer_thought_all_but_impossible_counts_in_the_error():
    """At T near 1 its probability is exp(−2000): below the smallest number there is."""
    scores, is_gold = drawn(4, 1.0, members=1, documents=20_000)
    scores[:, 0] = np.where(is_gold[0], -2000.0, 0.0)
    fitted = fit_temperature_of_mixture(scores, is_gold)
    t, step = np.log(fitted.temperature), 1e-4

    def losses(at):  # of every document; −log p is a difference of logarithms, which does not underflow
        z = scores[0] / np.exp(at)
        return special.logsumexp(z, axis=1) - z[is_gold]

    slope = (losses(t + step) - losses(t - step)) / (2 * step)
    curvature = (losses(t + step) - 2 * losses(t) + losses(t - step)) / step**2
    expected = np.sqrt((slope**2).sum()) / curvature.sum()
    assert fitted.standard_error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("margins", "documents", "low", "high"),
    [
        ([[0.03, 15.94, -0.9], [5.65, -0.03, 0.09]], [13, 14, 20], 0.0198, 2.403),
        ([[8.31, -0.59, 0.0], [-0.08, 0.23, 0.02]], [15, 16, 1], 0.0790, 2.151),
    ],
)
def test_of_two_minima_the_lower_one_is_found(margins, documents, low, high):
    """Members that are sure of different documents, and slightly wrong about the others': the loss is not unimodal."""
    scores = np.zeros((2, sum(documents), 2))
    scores[:, :, 0] = np.repeat(margins, documents, axis=1)
    is_gold = np.tile([True, False], (sum(documents), 1))
    log_t = np.log(low), np.log(high)
    losses = [plain_loss(scores, is_gold, t) for t in np.exp(np.linspace(*log_t, 50))]
    assert max(losses) > max(losses[0], losses[-1]) + 0.03
    fit = fit_temperature_of_mixture(scores, is_gold)
    assert fit.temperature == pytest.approx(low if losses[0] < losses[-1] else high, rel=0.03)


def test_five_folds_of_a_thousand_documents_take_a_moment():
    scores, is_gold = drawn(0, 1.0, members=5, documents=1000, choices=5)
    start = time.perf_counter()
    for _ in range(5):
        fit_temperature_of_mixture(scores, is_gold)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, g: (s[0], g), "scores has shape"),
        (lambda s, g: (s, g[1:]), "they need one"),
        (lambda s, g: (np.where(g, np.nan, s), g), "score is nan at index"),
        (lambda s, g: (np.where(g, np.inf, s), g), "score is inf at index"),
        (lambda s, g: (np.full_like(s, -np.inf), g), "every choice"),
        (lambda s, g: (s, g & False), "document 0 has no right choice"),
        (lambda s, g: (np.where(g, -np.inf, s), g), "document 0 has probability 0"),
        (lambda s, g: (s[:, :0], g[:0]), "there is no document"),
    ],
)
def test_what_has_no_temperature_is_refused(change, message):
    with pytest.raises(EnsembleError, match=message):
        fit_temperature_of_mixture(*change(*drawn(0, 1.0, documents=5)))
