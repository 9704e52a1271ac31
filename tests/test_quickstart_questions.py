from __future__ import annotations

import hashlib
import json

import pytest

from lm_eval_lora_ensemble.quickstart import questions
from lm_eval_lora_ensemble.quickstart.facts import CONTINENTS, COUNTRIES, ELEMENTS

BY_NAME = {country.name: country for country in COUNTRIES}
ELEMENT_BY_NAME = {element.name: element for element in ELEMENTS}

# of every question in order; a change here makes results incomparable: raise the tasks' version with it
SHA256 = {
    "countries": "12e5e89c15f5bbffe04632108bdace8db9736518e3a50adcf04b06934bae4ff9",
    "elements": "18b313e29de2b01ae5b237d37638aaaf55ba372d2f1dc87e284b5781f73b598b",
}


@pytest.fixture(scope="module")
def countries():
    return {split: list(rows) for split, rows in questions.countries().items()}


@pytest.fixture(scope="module")
def elements():
    return list(questions.elements()["test"])


def answer(row):
    return row["choices"][row["gold"]]


def test_facts_are_unambiguous():
    for table in (COUNTRIES, ELEMENTS):
        for column in (0, 1):  # name and capital, name and symbol
            values = [row[column] for row in table]
            assert len(set(values)) == len(values)
    assert {country.continent for country in COUNTRIES} == set(CONTINENTS)
    assert not [row for row in COUNTRIES if row.capital in row.name or row.name in row.capital]
    numbers = [element.number for element in ELEMENTS]
    assert numbers == sorted(set(numbers))


def test_sizes(countries, elements):
    assert {split: len(rows) for split, rows in countries.items()} == {
        "train": 188,
        "validation": 24,
        "test": 112,
    }
    assert len(elements) == 120


def test_every_question_has_four_different_choices_and_the_tables_answer(countries, elements):
    for row in [row for rows in countries.values() for row in rows] + elements:
        assert set(row) == {"question", "choices", "gold", "entity", "attribute"}
        assert len(set(row["choices"])) == len(row["choices"]) == 4
        assert 0 <= row["gold"] < 4
    for row in [row for rows in countries.values() for row in rows]:
        fact = BY_NAME[row["entity"]]
        assert answer(row) == (
            fact.name if row["attribute"] == "country" else getattr(fact, row["attribute"])
        )
    for row in elements:
        fact = ELEMENT_BY_NAME[row["entity"]]
        assert answer(row) == (fact.symbol if row["attribute"] == "symbol" else fact.name)


def test_no_wrong_choice_is_right_for_the_same_question(countries):
    for row in countries["train"] + countries["test"]:
        if row["attribute"] == "currency":
            assert row["choices"].count(BY_NAME[row["entity"]].currency) == 1


def test_splits_share_no_country_and_no_name_of_one(countries):
    def mentioned(split):
        rows = [row for row in countries[split] if row["attribute"] in ("capital", "country")]
        return {choice for row in rows for choice in row["choices"]} | {row["entity"] for row in rows}

    for first, second in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not mentioned(first) & mentioned(second)


def test_right_answers_are_spread_over_the_four_places(countries, elements):
    for rows in (countries["train"], countries["test"], elements):
        counts = [sum(row["gold"] == place for row in rows) for place in range(4)]
        assert min(counts) > len(rows) / 8


def test_metadata_that_lm_eval_passes_changes_nothing(countries):
    again = questions.countries(version=1.0, config_source="x.yaml", seed=7, pretrained="model")
    assert {split: list(rows) for split, rows in again.items()} == countries


def test_questions_are_the_same_everywhere(countries, elements):
    def digest(rows):
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    assert {"countries": digest(countries), "elements": digest(elements)} == SHA256
