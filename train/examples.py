"""Training and validation documents of lm-eval tasks, rendered and tokenised as the evaluation does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_lora_ensemble.errors import EnsembleError, first_line, nearest
from lm_eval_lora_ensemble.harness.golds import gold_indices

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.base import Base
    from lm_eval_lora_ensemble.train.recipe import Recipe

_FEWSHOT_SEED = 1234  # lm-eval's own default for drawing few-shot examples


@dataclass(frozen=True)
class Choice:
    """One answer choice as tokens: what the model is given, and what it is scored on."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


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
    """What a run trains on and validates on; ``validation`` is empty where no task has a validation split."""

    training: list[Example]
    validation: list[Example]


def load(recipe: Recipe, base: Base) -> Data:
    """Render and tokenise the recipe's tasks.

    Raises:
        EnsembleError: an unknown task, one that is not multiple choice or has no training split, a document
            without a right answer, or one that is too long.
    """
    training: list[Example] = []
    validation: list[Example] = []
    for name, task in load_tasks(recipe.task, recipe.include_path).items():
        training += _split(recipe, base, name, task, split="training")
        if task.has_validation_docs() and recipe.validation_limit != 0:
            validation += _split(recipe, base, name, task, split="validation")
    if not training:
        raise EnsembleError(f"task {', '.join(recipe.task)}: the training split is empty")
    if recipe.early_stopping is not None and not validation:
        raise EnsembleError(
            f"early_stopping needs a validation split and {', '.join(recipe.task)} has none; remove the key"
        )
    return Data(training, validation)


def load_tasks(names: Sequence[str], include_path: str | None = None) -> dict[str, Any]:
    """Load lm-eval tasks by name, groups expanded; each must be multiple choice with training data."""
    manager = _task_manager(include_path)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else "`lm_eval ls tasks` lists them"
            raise EnsembleError(f"lm-eval knows no task {name!r}; {hint}")
    try:
        tasks: dict[str, Any] = manager.load(list(names))["tasks"]
    except (OSError, ValueError, LookupError, ImportError) as error:
        raise EnsembleError(
            f"task {', '.join(names)} cannot be loaded: {type(error).__name__}: {first_line(error)}; "
            "check its name and that its dataset can be had from here"
        ) from error
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


def _task_manager(include_path: str | None) -> Any:
    """Return a TaskManager that sees this package's tasks, whether or not the start-up file is active."""
    from lm_eval.tasks import TaskManager

    from lm_eval_lora_ensemble.harness.plugin import add_tasks_folder

    add_tasks_folder()
    return TaskManager(include_path=include_path)


def _num_fewshot(recipe: Recipe, task: Any) -> int:
    if recipe.num_fewshot is not None:
        return recipe.num_fewshot
    return int(task.get_config("num_fewshot") or 0)


def _split(recipe: Recipe, base: Base, name: str, task: Any, *, split: str) -> list[Example]:
    """Render one split of one task."""
    docs = list(task.training_docs() if split == "training" else task.validation_docs())
    limit = recipe.train_limit if split == "training" else recipe.validation_limit
    ids = _subset(len(docs), limit, recipe.subset_seed)
    task.set_fewshot_seed(_FEWSHOT_SEED)
    shots = _num_fewshot(recipe, task)
    own_split = task.config.training_split if split == "training" else task.config.validation_split
    with _shots_exclude_document(task, own_split):
        examples = [render(task, i, docs[i], shots, base) for i in ids]
    return _fit(examples, base.max_length, recipe.truncate, f"{name} ({split})")


def _subset(total: int, limit: int | None, seed: int | None) -> list[int]:
    """Return the indices of the documents used: the first ``limit``, or that many drawn with ``seed``."""
    if limit is None or limit >= total:
        return list(range(total))
    return list(range(limit)) if seed is None else sorted(random.Random(seed).sample(range(total), limit))


@contextmanager
def _shots_exclude_document(task: Any, split: str) -> Iterator[None]:
    """Keep a document from being its own few-shot example, where both come from ``split``.

    lm-eval leaves a document out of its own shots only if the shots come from the test split; for the time
    of rendering, ``split`` takes that role.
    """
    previous = task.config.test_split
    task.config.test_split = split
    try:
        yield
    finally:
        task.config.test_split = previous


def render(task: Any, doc_id: int, doc: Any, shots: int, base: Base) -> Example:
    """Build the requests lm-eval would score for ``doc`` and tokenise them."""
    name = task.task_name
    context = task.fewshot_context(doc, num_fewshot=shots)
    requests = task.construct_requests(doc=doc, ctx=context, metadata=(name, doc_id, 1))
    answers = task.doc_to_choice(doc)
    # Tasks that also score the choices without a context (acc_mutual_info) append those requests.
    pairs = [base.encode(*request.args[:2]) for request in requests[: len(answers)]]
    choices = tuple(Choice(tuple(context), tuple(continuation)) for context, continuation in pairs)
    if any(not choice.continuation for choice in choices):
        raise EnsembleError(f"document {doc_id} of {name} has an answer choice without a token; fix the task")
    try:
        golds = gold_indices(task, doc, answers)
    except LookupError as error:
        raise EnsembleError(
            f"document {doc_id} of {name} has no right answer: {error}; training needs labelled documents"
        ) from error
    return Example(name, doc_id, choices, golds)


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
    return Choice(choice.context[-keep:], choice.continuation)
