from __future__ import annotations

import difflib
import hashlib
import json

import pytest

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.quickstart import questions
from lm_eval_lora_ensemble.quickstart.facts import CONTINENTS, COUNTRIES, INVENTED_PLACES

BY_NAME = {country.name: country for country in COUNTRIES}
PLACE_BY_NAME = {place.name: place for place in INVENTED_PLACES}

# of every question in order; a change here makes results incomparable: raise the tasks' version with it
SHA256 = {
    "countries": "d6b7b7a54c09b14e4eb71258eb3ccc36a1f18b1437d40fe99aa129d544bdb04e",
    "invented": "b2ad1a44cb9dc4697a61bb94f3f3e3cdb96f545fe0e3f0f31a9e9f097fd56bdb",
}


@pytest.fixture(scope="module")
def countries():
    return {split: list(rows) for split, rows in questions.countries().items()}


@pytest.fixture(scope="module")
def invented():
    return {split: list(rows) for split, rows in questions.invented().items()}


def answer(row):
    return row["choices"][row["gold"]]


def test_facts_are_unambiguous():
    for column in (0, 1):  # name and capital
        values = [row[column] for row in COUNTRIES]
        assert len(set(values)) == len(values)
    assert {country.continent for country in COUNTRIES} == set(CONTINENTS)
    assert not [row for row in COUNTRIES if row.capital in row.name or row.name in row.capital]


def test_invented_places_are_no_real_ones_and_name_none():
    coined = [name.lower() for place in INVENTED_PLACES for name in place]
    real = [name.lower() for country in COUNTRIES for name in (country.name, country.capital)]
    real += [continent.lower() for continent in CONTINENTS]
    assert len(set(coined)) == len(coined)
    assert not [(a, b) for a in coined for b in real if a in b or b in a]
    # nor one that a slip of the pen makes of a real one
    assert not [(name, near) for name in coined if (near := difflib.get_close_matches(name, real, 1, 0.8))]


def test_sizes(countries, invented):
    assert {split: len(rows) for split, rows in countries.items()} == {
        "train": 140,
        "validation": 72,
        "test": 112,
    }
    assert {split: len(rows) for split, rows in invented.items()} == {"validation": 72, "test": 112}


def test_every_question_has_four_different_choices_and_the_tables_answer(countries):
    for row in [row for rows in countries.values() for row in rows]:
        assert set(row) == {"question", "choices", "gold", "entity", "attribute"}
        assert len(set(row["choices"])) == len(row["choices"]) == 4
        assert 0 <= row["gold"] < 4
        fact = BY_NAME[row["entity"]]
        assert answer(row) == (
            fact.name if row["attribute"] == "country" else getattr(fact, row["attribute"])
        )


def test_invented_questions_are_the_real_ones_with_another_name(countries, invented):
    """What tells the two sets apart is the place's name and nothing else."""
    for split in ("validation", "test"):
        assert len(invented[split]) == len(countries[split])
        for real, coined in zip(countries[split], invented[split], strict=True):
            country, place = BY_NAME[real["entity"]], PLACE_BY_NAME[coined["entity"]]
            asked = (
                (country.capital, place.capital)
                if real["attribute"] == "country"
                else (country.name, place.name)
            )
            before, after = real["question"].split(asked[0])
            assert coined["question"] == f"{before}{asked[1]}{after}"
            for key in ("choices", "gold", "attribute"):
                assert coined[key] == real[key]
            # a place that does not exist is never an answer
            assert not {place.name, place.capital} & set(coined["choices"])


def test_no_invented_place_is_in_two_splits(invented):
    validation, test = ({row["entity"] for row in invented[split]} for split in ("validation", "test"))
    assert not validation & test
    assert validation | test == set(PLACE_BY_NAME)


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


def test_right_answers_are_spread_over_the_four_places(countries):
    for rows in (countries["train"], countries["validation"], countries["test"]):
        counts = [sum(row["gold"] == place for row in rows) for place in range(4)]
        assert min(counts) > len(rows) / 8


def test_metadata_that_lm_eval_passes_changes_nothing(countries, invented):
    for make, rows in ((questions.countries, countries), (questions.invented, invented)):
        again = make(version=1.0, config_source="x.yaml", seed=7, pretrained="model")
        assert {split: list(split_rows) for split, split_rows in again.items()} == rows


def test_questions_are_the_same_everywhere(countries, invented):
    def digest(rows):
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    assert {"countries": digest(countries), "invented": digest(invented)} == SHA256


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "task.yaml").write_text("task: mine")
    assert cli.main(["quickstart", "--output", str(tmp_path)]) == 2
    assert "holds task.yaml, which no quickstart wrote" in capsys.readouterr().err
    assert cli.main(["quickstart", "--output", str(tmp_path / "task.yaml")]) == 2
    assert cli.main(["quickstart", "--output", str(tmp_path / "q"), "--members", "0"]) == 2
    assert "members is 0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["task.yaml"]
