"""Training and validation documents of lm-eval tasks, rendered and tokenised as the evaluation does."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness import rendering
from lm_eval_lora_ensemble.harness.rendering import RenderedDocument

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.base import Base
    from lm_eval_lora_ensemble.train.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """One answer choice as tokens.

    Attributes:
        context: what the model is given.
        continuation: what it is scored on.
        characters: of its text, without the delimiter before it; None where choices differ in their contexts.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    characters: int | None = None


@dataclass(frozen=True)
class Example:
    """One multiple-choice document.

    Attributes:
        task: lm-eval task it comes from.
        doc_id: its place in the task's split.
        choices: its answer choices, in the task's order.
        gold: indices of the right choices; nearly always one.
    """

    task: str
    doc_id: int
    choices: tuple[Choice, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True)
class Data:
    """What a run trains on and validates on.

    Attributes:
        training: of all tasks.
        validation: of all tasks; empty where no task has a validation split.
        evaluated: tasks that lm-eval evaluates on the very split that ``validation`` is from.
    """

    training: list[Example]
    validation: list[Example]
    evaluated: tuple[str, ...] = ()


def load(recipe: Recipe, base: Base) -> Data:
    """Render and tokenise the recipe's tasks.

    Raises:
        EnsembleError: an unknown task, one that is not multiple choice or has no training split, a document
            without a right answer, or one that is too long.
    """
    training: list[Example] = []
    validation: list[Example] = []
    evaluated: list[str] = []
    for name, task in load_tasks(recipe.task, recipe.include_path).items():
        training += _split(recipe, base, name, task, split="training")
        if task.has_validation_docs() and recipe.validation_limit != 0:
            validation += _split(recipe, base, name, task, split="validation")
            evaluated += [name] * rendering.is_evaluated(task, "validation")
    if not training:
        raise EnsembleError(f"task {', '.join(recipe.task)}: the training split is empty")
    if recipe.early_stopping is not None and not validation:
        raise EnsembleError(
            f"early_stopping needs a validation split and {', '.join(recipe.task)} has none; remove the key"
        )
    if recipe.early_stopping is not None and evaluated:
        log.warning(
            "early_stopping chooses epochs by the validation split, which is what lm-eval evaluates of %s: its results "
            "will be too good; remove the key, or judge the members on another task",
            ", ".join(evaluated),
        )
    return Data(training, validation, tuple(evaluated))


def load_tasks(names: Sequence[str], include_path: str | None = None) -> dict[str, Any]:
    """Load lm-eval tasks by name, groups expanded; each must be multiple choice with training data."""
    tasks = rendering.load_tasks(names, include_path)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice":
            raise EnsembleError(
                f"task {name!r} is {task.OUTPUT_TYPE}; members train on multiple-choice tasks"
            )
        if not task.has_training_docs():
            raise EnsembleError(
                f"task {name!r} has no training split; name a task that has one, or give it a training_split"
            )
    return tasks


def _split(recipe: Recipe, base: Base, name: str, task: Any, *, split: rendering.Split) -> list[Example]:
    """Render and tokenise one split of one task."""
    docs = rendering.split_documents(task, split)
    limit = recipe.train_limit if split == "training" else recipe.validation_limit
    ids = _subset(len(docs), limit, recipe.subset_seed)
    documents = rendering.render(task, split, docs, ids, recipe.num_fewshot)
    examples = [_tokenised(document, base) for document in documents]
    return _fit(examples, base.max_length, recipe.truncate, f"{name} ({split})")


def _subset(total: int, limit: int | None, seed: int | None) -> list[int]:
    """Return the indices of the documents used: the first ``limit``, or that many drawn with ``seed``."""
    if limit is None or limit >= total:
        return list(range(total))
    return list(range(limit)) if seed is None else sorted(random.Random(seed).sample(range(total), limit))


def _tokenised(document: RenderedDocument, base: Base) -> Example:
    """Tokenise a document as lm-eval does when it scores it."""
    lengths = document.characters or (None,) * len(document.requests)
    choices = []
    for texts, characters in zip(document.requests, lengths, strict=True):
        context, continuation = base.encode(*texts)
        if not continuation:
            raise EnsembleError(
                f"document {document.doc_id} of {document.task} has an answer choice without a token; fix the task"
            )
        choices.append(Choice(tuple(context), tuple(continuation), characters))
    return Example(document.task, document.doc_id, tuple(choices), document.golds)


def _fit(examples: list[Example], max_length: int, truncate: str, place: str) -> list[Example]:
    """Refuse documents longer than ``max_length``, or cut their contexts from the left; never an answer."""
    lengths = [max(_input_length(choice) for choice in example.choices) for example in examples]
    over = [length for length in lengths if length > max_length]
    if not over:
        return examples
    if truncate == "refuse":
        raise EnsembleError(
            f"{len(over)} of {len(examples)} documents of {place} are longer than max_length={max_length} "
            f"tokens (longest {max(over)}); raise it, or cut contexts from the left with truncate=left"
        )
    answers = max(len(choice.continuation) for example in examples for choice in example.choices)
    if answers > max_length:
        raise EnsembleError(
            f"an answer of {place} has {answers} tokens, more than max_length={max_length}; raise max_length"
        )
    return [
        Example(
            example.task,
            example.doc_id,
            tuple(_cut(choice, max_length) for choice in example.choices),
            example.gold,
        )
        for example in examples
    ]


def _input_length(choice: Choice) -> int:
    """Tokens a forward pass sees: the last one is only predicted."""
    return len(choice.context) + len(choice.continuation) - 1


def _cut(choice: Choice, max_length: int) -> Choice:
    keep = max_length + 1 - len(choice.continuation)
    return replace(choice, context=choice.context[-keep:])
