"""The quickstart's question sets: four-choice questions made from the tables of facts, the same every time.

``countries`` is what the members are trained on and tested in domain, with no country in two of its splits.
``invented`` is out of domain: the same held-out questions, word for word and with the same choices, about places
that do not exist. Both serve as an lm-eval task's ``custom_dataset``.

Every question is drawn with a generator seeded by its own entity and attribute, so that a fact added to
the tables leaves the other questions as they were.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from lm_eval_lora_ensemble.quickstart.facts import (
    CONTINENTS,
    COUNTRIES,
    INVENTED_PLACES,
    Country,
    InventedPlace,
)

if TYPE_CHECKING:
    from datasets import Dataset

N_CHOICES = 4
VALIDATION_COUNTRIES = 18
TEST_COUNTRIES = 28


class Question(TypedDict):
    """One row of a data set.

    ``gold`` is the index of the right answer in ``choices``. About an invented place no answer is right: there it
    is where the answer was before the name was changed, and who agrees with it has guessed.
    """

    question: str
    choices: list[str]
    gold: int
    entity: str
    attribute: str


def countries(**_: Any) -> dict[str, Dataset]:
    """Return the splits train, validation and test of questions about countries, disjoint by country.

    lm-eval passes a task's metadata and dataset_kwargs as keywords; none of them changes the questions.
    """
    return {split: _dataset(_country_questions(rows)) for split, rows in country_splits().items()}


def invented(**_: Any) -> dict[str, Dataset]:
    """Return the splits validation and test of questions about places that do not exist, disjoint by place.

    Each is a question of the same split of ``countries`` with the name changed. lm-eval passes a task's metadata
    and dataset_kwargs as keywords; none of them changes the questions.
    """
    splits = country_splits()
    held_out = [*splits["test"], *splits["validation"]]
    places = {
        country.name: (country, place) for country, place in zip(held_out, INVENTED_PLACES, strict=True)
    }
    return {
        split: _dataset(_with_names(_country_questions(splits[split]), places))
        for split in ("validation", "test")
    }


def country_splits() -> dict[str, list[Country]]:
    """Return the countries of each split, in a fixed random order."""
    shuffled = sorted(COUNTRIES, key=lambda country: random.Random(f"split:{country.name}").random())
    held_out = VALIDATION_COUNTRIES + TEST_COUNTRIES
    return {
        "train": shuffled[held_out:],
        "validation": shuffled[TEST_COUNTRIES:held_out],
        "test": shuffled[:TEST_COUNTRIES],
    }


def _country_questions(rows: Sequence[Country]) -> list[Question]:
    """Ask four things of every country in one split.

    Wrong capitals and countries come from the same split, so that no answer of a test question is ever seen
    in training, and from the same continent as far as that goes, so that the continent does not give the
    answer away.
    """
    questions = []
    for row in rows:
        near = [other for other in rows if other.continent == row.continent]
        far = [other for other in rows if other.continent != row.continent]
        questions += [
            _question(
                (row.name, "capital"),
                f"What is the capital of {row.name}?",
                row.capital,
                [other.capital for other in near],
                [other.capital for other in far],
            ),
            _question(
                (row.name, "country"),
                f"{row.capital} is the capital of which country?",
                row.name,
                [other.name for other in near],
                [other.name for other in far],
            ),
            _question(
                (row.name, "continent"), f"On which continent is {row.name}?", row.continent, CONTINENTS
            ),
            _question(
                (row.name, "currency"),
                f"What is the currency of {row.name}?",
                row.currency,
                [other.currency for other in COUNTRIES],
            ),
        ]
    return questions


def _with_names(
    questions: Iterable[Question], places: Mapping[str, tuple[Country, InventedPlace]]
) -> list[Question]:
    """Put an invented name in place of the real one in every question and leave the rest as it was.

    Form and choices then tell the two sets apart nowhere: only the name does.
    """
    return [_with_name(question, *places[question["entity"]]) for question in questions]


def _with_name(question: Question, country: Country, place: InventedPlace) -> Question:
    text = question["question"]
    if question["attribute"] == "country":  # which names the capital and asks for the country
        text = text.replace(country.capital, place.capital)
    else:
        text = text.replace(country.name, place.name)
    return Question(
        question=text,
        choices=question["choices"],
        gold=question["gold"],
        entity=place.name,
        attribute=question["attribute"],
    )


def _question(
    about: tuple[str, str], text: str, answer: str, likely: Iterable[str], others: Iterable[str] = ()
) -> Question:
    """Put the answer among wrong choices.

    Args:
        about: entity and attribute; the seed of the draw.
        text: the question itself.
        answer: the right choice.
        likely: where wrong choices are drawn from; the answer may be among them.
        others: where they are drawn from once ``likely`` is used up.
    """
    entity, attribute = about
    rng = random.Random(f"{entity}:{attribute}")
    wrong: list[str] = []
    for pool in (likely, others):
        candidates = sorted(set(pool) - {answer, *wrong})
        wrong += rng.sample(candidates, min(N_CHOICES - 1 - len(wrong), len(candidates)))
    choices = [answer, *wrong]
    rng.shuffle(choices)
    return Question(
        question=text, choices=choices, gold=choices.index(answer), entity=entity, attribute=attribute
    )


def _dataset(questions: Sequence[Question]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list([dict(question) for question in questions])
