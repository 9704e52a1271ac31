"""Which choices of a document are right, as lm-eval's own scoring of multiple choice derives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def gold_indices(task: Any, doc: Any, choices: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of a document's right choices, nearly always one.

    The derivation is that of ``ConfigurableTask.process_results``: the gold is what ``doc_to_target`` says, or
    ``doc_to_text`` where the context varies with the choice; a text counts as the choice it equals, a list as
    several right choices, of which those outside the choices are passed over. A single gold outside them lm-eval lets
    pass too and calls every answer wrong; here it is an error.

    Args:
        task: an lm-eval ``ConfigurableTask`` of multiple choice that scores documents in the stock way.
        doc: one of its documents.
        choices: ``task.doc_to_choice(doc)``.

    Raises:
        LookupError: the document has no gold, or one that is none of its choices; the message names it.
    """
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        golds = [choices.index(gold)] if gold in choices else []
    else:
        given = list(gold) if isinstance(gold, (list, tuple)) else [gold]
        # `in range` compares numbers of any type, and takes None or a text for what they are: no index
        golds = [index for index in given if index in range(len(choices))]
    if not golds:
        raise LookupError(f"the gold {gold!r} is none of its {len(choices)} choices")
    return tuple(sorted({int(index) for index in golds}))


def _labelled_right(doc: Any) -> list[int]:
    """Return what truthfulqa_mc2 counts as right: several of its choices, whose mass is the score."""
    golds = [index for index, label in enumerate(doc["mc2_targets"]["labels"]) if label == 1]
    if not golds:
        raise LookupError("none of its choices is labelled right")
    return golds


KNOWN_SCORERS: dict[str, Callable[[Any], list[int]]] = {"process_results_mc2": _labelled_right}
"""Scorings of tasks' own whose gold choices are known, by the name of the function in the task's YAML."""
