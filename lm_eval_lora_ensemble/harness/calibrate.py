"""``lora-ensemble calibrate ENSEMBLE TASK``: fit the scale of adapters from elsewhere, and keep it with them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.ensemble.calibration import SPLITS, Calibration, fit_calibration, in_words
from lm_eval_lora_ensemble.ensemble.listing import manifest_of, require_listable
from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.arguments import add_scoring_arguments, parse_model_args
from lm_eval_lora_ensemble.harness.rendering import (
    RenderedDocument,
    Split,
    is_evaluated,
    load_tasks,
    render,
    split_documents,
)

_OF_THE_WHOLE = ("adapters", "members", "epoch", "average")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("ensemble", type=Path, help="an ensemble folder, or a folder of adapter folders")
    parser.add_argument("task", help="multiple-choice lm-eval task with labelled documents; several: A,B")
    parser.add_argument(
        "--split", default="validation", help="validation or training (default: %(default)s); never test"
    )
    parser.add_argument("--limit", type=int, help="only the first N documents of each task")
    add_scoring_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Fit the temperatures, write them into the folder's ensemble.json and print them.

    Raises:
        EnsembleError: a split or task without labelled documents of its own, a folder that cannot have a manifest,
            or members that cannot be loaded or scored.
    """
    folder = arguments.ensemble.expanduser()
    model_args = _model_args(arguments.model_args)
    if arguments.split not in SPLITS:
        raise EnsembleError(
            f"--split {arguments.split}: a temperature is fitted to {' or '.join(SPLITS)} documents, never to those "
            "that it will be judged on"
        )
    if arguments.limit is not None and arguments.limit < 1:
        raise EnsembleError(f"--limit {arguments.limit}: give a whole number above 0")
    require_listable(folder)
    names = [name.strip() for name in arguments.task.split(",") if name.strip()]
    documents = _documents(
        names, arguments.split, arguments.limit, arguments.num_fewshot, arguments.include_path
    )

    from lm_eval_lora_ensemble.harness.loaded import load_ensemble

    base = model_args.pop("pretrained", None)
    where = {"batch_size": arguments.batch_size, "device": arguments.device}
    loaded = load_ensemble(base, folder, **{**where, **model_args})
    pairs = [pair for document in documents for pair in document.requests]
    scores = loaded.loglikelihoods(*map(list, zip(*pairs, strict=True)))
    calibration = _calibration(",".join(names), arguments.split, documents, scores)
    path = folder / FILE_NAME
    try:
        replace(manifest_of(folder, loaded.model.ensemble), calibration=calibration).write(folder)
    except OSError as error:
        raise EnsembleError(f"cannot write {path}: {error.strerror or error}") from error
    print("\n".join([*in_words(calibration), f"written into {path}"]))
    return 0


def _model_args(text: str) -> dict[str, Any]:
    given = parse_model_args(text)
    for name in _OF_THE_WHOLE:
        if name in given:
            raise EnsembleError(
                f"--model_args {name}=: a temperature is fitted for the whole ensemble in its folder; leave it out"
            )
    return given


def _documents(
    names: Sequence[str], split: Split, limit: int | None, num_fewshot: int | None, include_path: str | None
) -> list[RenderedDocument]:
    """Render the documents of every task.

    Raises:
        EnsembleError: a task is unknown, not multiple choice, or evaluated on that split or without it.
    """
    documents: list[RenderedDocument] = []
    other = "training" if split == "validation" else "validation"
    for name, task in load_tasks(names, include_path).items():
        if task.OUTPUT_TYPE != "multiple_choice":
            raise EnsembleError(f"task {name!r} is {task.OUTPUT_TYPE}; only choices have a temperature")
        if not (task.has_training_docs() if split == "training" else task.has_validation_docs()):
            raise EnsembleError(f"task {name!r} has no {split} split; try --split {other}, or another task")
        if is_evaluated(task, split):
            raise EnsembleError(
                f"task {name!r} is evaluated on its {split} split, to which no temperature may be fitted; "
                f"try --split {other}, or another task"
            )
        docs = split_documents(task, split)
        documents += render(task, split, docs, range(len(docs))[:limit], num_fewshot)
    if not documents:
        raise EnsembleError(f"the {split} split of {', '.join(names)} is empty; name another task")
    return documents


def _calibration(
    task: str, split: str, documents: Sequence[RenderedDocument], scores: np.ndarray[Any, Any]
) -> Calibration:
    """Fit to the scores [N, R] of the documents' requests, which follow each other."""
    shape = len(documents), max(len(document.requests) for document in documents)
    lls = np.full((len(scores), *shape), -np.inf)
    is_gold = np.zeros(shape, dtype=bool)
    lengths = np.ones(shape, dtype=np.int64)
    end = 0
    for d, document in enumerate(documents):
        start, end = end, end + len(document.requests)
        lls[:, d, : end - start] = scores[:, start:end]
        is_gold[d, list(document.golds)] = True
        lengths[d, : end - start] = document.characters or 1
    has_lengths = all(document.characters and all(document.characters) for document in documents)
    return fit_calibration(task, split, lls, is_gold, lengths if has_lengths else None)
