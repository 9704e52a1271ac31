"""Benchmarks asked for by letter: rows of one form, and a validation split that the data sets do not have.

The literature on Bayesian LoRA trains on ``train`` and tests on ``validation``, and says nothing of where its settings
were chosen. Here a tenth of ``train`` is kept back for that. Which tenth, a hash of the question and its choices
decides: each document by itself, so that repeated rows stay together and so do the rows that WinoGrande's nested
training sets share.

Each public function is the ``custom_dataset`` of lm-eval tasks, which calls it with the task's ``metadata`` and
``dataset_kwargs``. It returns the splits ``train``, ``validation`` and ``test`` with the columns ``question``,
``choices`` (2 to 5 texts) and ``answer`` (index of the right one).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]


def arc(*, dataset: str, dataset_config: str, **_: Any) -> dict[str, Dataset]:
    """ARC, whose labels are letters in most rows and digits in some."""
    return _splits(dataset, dataset_config, lambda row: _labelled(row["question"], row))


def openbookqa(*, dataset: str, dataset_config: str, **_: Any) -> dict[str, Dataset]:
    """OpenBookQA: the stem, without the book's fact."""
    return _splits(dataset, dataset_config, lambda row: _labelled(row["question_stem"], row))


def winogrande(*, dataset: str, dataset_config: str, **_: Any) -> dict[str, Dataset]:
    """WinoGrande: the sentence with its blank, and the two words for it."""

    def ask(row: Row) -> Row:
        return _row(row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)

    return _splits(dataset, dataset_config, ask)


def boolq(*, dataset: str, dataset_config: str, **_: Any) -> dict[str, Dataset]:
    """BoolQ: the passage and below it the question, in lm-eval's words for its labels false and true."""

    def ask(row: Row) -> Row:
        return _row(f"{row['passage']}\n{row['question']}?", ["no", "yes"], int(row["label"]))

    return _splits(dataset, dataset_config, ask)


def hellaswag(*, dataset: str, **_: Any) -> dict[str, Dataset]:
    """HellaSwag, in the words of lm-eval's task."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    def ask(row: Row) -> Row:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return _row(
            preprocess(context), [preprocess(ending).strip() for ending in row["endings"]], int(row["label"])
        )

    return _splits(dataset, None, ask)


def is_held_out(row: Row) -> bool:
    """Whether a training document is one of the tenth that is kept for validation, by its text alone."""
    text = json.dumps([row["question"], row["choices"]], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0


def _labelled(question: str, row: Row) -> Row:
    choices = row["choices"]
    return _row(question, choices["text"], choices["label"].index(row["answerKey"].strip()))


def _row(question: str, choices: list[str], answer: int) -> Row:
    return {"question": question, "choices": choices, "answer": answer}


def _splits(dataset: str, dataset_config: str | None, ask: Callable[[Row], Row]) -> dict[str, Dataset]:
    """Load a data set's labelled splits, bring their rows to one form, and hold out a tenth of the training rows."""
    from datasets import Dataset, load_dataset

    train, validation = load_dataset(dataset, dataset_config, split=["train", "validation"])
    rows = [ask(row) for row in train]
    splits = {
        "train": [row for row in rows if not is_held_out(row)],
        "validation": [row for row in rows if is_held_out(row)],
        "test": [ask(row) for row in validation],
    }
    return {name: Dataset.from_list(of_split) for name, of_split in splits.items()}
