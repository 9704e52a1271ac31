"""Documents of lm-eval tasks' training and validation splits, rendered as lm-eval renders those it scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm_eval_lora_ensemble.errors import EnsembleError, first_line, nearest
from lm_eval_lora_ensemble.harness.golds import gold_indices

Split = Literal["training", "validation"]

_FEWSHOT_SEED = 1234  # lm-eval's own default for drawing few-shot examples


@dataclass(frozen=True)
class RenderedDocument:
    """One multiple-choice document as texts.

    Attributes:
        task: lm-eval task it comes from.
        doc_id: its place in the task's split.
        requests: context and continuation of each choice, in the task's order.
        golds: indices of the right choices; nearly always one.
        characters: of each choice's text, as lm-eval's acc_norm counts them (without the delimiter); None where
            the choices differ in their contexts, so that no continuation has the length of its choice.
    """

    task: str
    doc_id: int
    requests: tuple[tuple[str, str], ...]
    golds: tuple[int, ...]
    characters: tuple[int, ...] | None


def load_tasks(names: Sequence[str], include_path: str | None = None) -> dict[str, Any]:
    """Load lm-eval tasks by name, groups expanded.

    Raises:
        EnsembleError: lm-eval knows no such task, or it cannot be loaded.
    """
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise EnsembleError(f"include_path={include_path}: there is no such folder")
    if not any(names):
        raise EnsembleError("no task was named")
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
    return tasks


def _task_manager(include_path: str | None) -> Any:
    """Return a TaskManager that sees this package's tasks, whether or not the start-up file is active."""
    from lm_eval.tasks import TaskManager

    from lm_eval_lora_ensemble.harness.plugin import add_tasks_folder

    add_tasks_folder()
    return TaskManager(include_path=include_path)


def split_documents(task: Any, split: Split) -> list[Any]:
    """Return the documents of a task's split, as the task itself prepares them."""
    return list(task.training_docs() if split == "training" else task.validation_docs())


def is_evaluated(task: Any, split: Split) -> bool:
    """Whether a split is the one that lm-eval evaluates: the test split, or without one the validation split."""
    config = task.config
    evaluated = config.test_split if task.has_test_docs() else config.validation_split
    return bool(evaluated == (config.training_split if split == "training" else config.validation_split))


def render(
    task: Any, split: Split, docs: Sequence[Any], doc_ids: Sequence[int], num_fewshot: int | None = None
) -> list[RenderedDocument]:
    """Render documents of a task's split; a document is never its own few-shot example.

    Args:
        task: of multiple choice.
        split: where the documents are from.
        docs: :func:`split_documents` of it.
        doc_ids: the places in it of the documents to render.
        num_fewshot: example documents in front of each; None is the task's own number.

    Raises:
        EnsembleError: a document without a right answer.
    """
    task.set_fewshot_seed(_FEWSHOT_SEED)
    shots = int(task.get_config("num_fewshot") or 0) if num_fewshot is None else num_fewshot
    own_split = task.config.training_split if split == "training" else task.config.validation_split
    with _shots_exclude_document(task, own_split):
        return [_render(task, doc_id, docs[doc_id], shots) for doc_id in doc_ids]


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


def _render(task: Any, doc_id: int, doc: Any, shots: int) -> RenderedDocument:
    """Build the requests lm-eval would score for ``doc``."""
    name = task.task_name
    try:
        context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
    except ValueError as error:
        if shots == 0:
            raise
        raise EnsembleError(
            f"{shots} examples in front of document {doc_id} of {name} cannot be had ({first_line(error)}); give a "
            "smaller num_fewshot"
        ) from error
    requests = task.construct_requests(doc=doc, ctx=context, metadata=(name, doc_id, 1))
    answers = task.doc_to_choice(doc)
    try:
        golds = gold_indices(task, doc, answers)
    except LookupError as error:
        raise EnsembleError(
            f"document {doc_id} of {name} has no right answer: {error}; labelled documents are needed"
        ) from error
    # Tasks that also score the choices without a context (acc_mutual_info) append those requests.
    texts = tuple((request.args[0], request.args[1]) for request in requests[: len(answers)])
    characters = None if task.multiple_input else tuple(map(len, answers))
    return RenderedDocument(name, doc_id, texts, golds, characters)
