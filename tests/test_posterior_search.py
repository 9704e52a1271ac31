"""Searches on functions whose answer is known."""

from __future__ import annotations

import math

import pytest

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.search import Step, largest_passing, least


@pytest.mark.parametrize("boundary", [3e-6, 0.008, 0.0100001, 0.5, 70.0])
def test_bisection_finds_the_last_that_passed(boundary):
    path: list[Step] = []
    found = largest_passing(lambda x: x / boundary, 1.0, start=0.01, factor=3, steps=6, path=path)
    assert found <= boundary < found * 3 ** (0.5**6) * (1 + 1e-12)
    measured = {step.at: step for step in path}
    assert measured[found].passed
    assert all(step.passed == (step.value <= 1) and step.value == step.at / boundary for step in path)
    assert path[0].at == 0.01
    assert {step.passed for step in path} == {True, False}
    widenings = len(path) - 1 - 6
    assert widenings == math.ceil(abs(math.log(boundary / 0.01, 3)))


def test_a_measure_that_is_not_monotone_still_gives_one_that_passed():
    path: list[Step] = []
    found = largest_passing(lambda x: math.sin(40 * x) + x, 0.5, start=0.01, path=path)
    assert next(step for step in path if step.at == found).passed


def test_nan_fails():
    path: list[Step] = []
    assert largest_passing(lambda x: math.nan if x > 1 else 0.0, 0.1, start=0.9, path=path) <= 1


@pytest.mark.parametrize(("value", "word"), [(0.0, "passes"), (1.0, "fails")])
def test_without_a_bracket_the_search_says_so(value, word):
    with pytest.raises(EnsembleError, match=f"every value {word} the tolerance 0.5"):
        largest_passing(lambda _: value, 0.5, start=0.01, path=[])


@pytest.mark.parametrize("optimum", [1e-3, 2.0, 3e4, 1e7])
def test_least_finds_the_minimum_before_the_plateau(optimum):
    def loss(x):
        t = math.log(x / optimum)
        return 2 - 2 * math.exp(-(t**2) / 2) if t > 0 else t**2

    path: list[Step] = []
    found = least(loss, 2.0, start=100.0, steps=10, path=path)
    assert abs(math.log(found / optimum)) < 0.25
    assert loss(found) == min(step.value for step in path)


@pytest.mark.parametrize("beginning", [[9.1, 9.4, 9.3, 9.2], [math.inf] * 4])
def test_least_goes_on_through_what_is_far_worse_than_the_plateau(beginning):
    def loss(x):
        place = round(math.log10(x))
        return (
            beginning[place]
            if 0 <= place < len(beginning) and x < 5e3
            else 2 + (math.log10(x) - 6) ** 2 / 100 - 0.1
        )

    found = least(lambda x: min(loss(x), 2.0) if x > 1e8 else loss(x), 2.0, start=1.0, steps=8, path=[])
    assert abs(math.log10(found) - 6) < 0.5


def test_least_stops_on_a_plateau_that_is_the_best():
    path: list[Step] = []
    found = least(lambda x: 1 + 1 / x, 1.0, start=10.0, path=path)
    assert found == max(step.at for step in path)
    assert len(path) < 12
