"""The documents worth looking at: most uncertain, most confidently wrong, most disagreed about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.analysis.foreign_samples import arguments_of
from lm_eval_lora_ensemble.analysis.samples import iter_samples
from lm_eval_lora_ensemble.metrics.information import mutual_information, predictive_entropy
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.report.entries import Entry

REASONS = ("most uncertain", "confident and wrong", "members disagree")

_QUESTION = 700
_CHOICE = 240
_FEWEST, _MOST = 5, 100


@dataclass(frozen=True)
class Document:
    """One document of one run.

    Attributes:
        entry: index of the run.
        task: the task, not the group.
        number: lm-eval's doc_id.
        question: the end of the context, "" where the samples file holds no text.
        choices: their texts, "" each where there is none.
        golds: indices of the right choices; empty where unknown.
        mixture: (C,) p̄.
        members: (N, C).
        entropy: H[p̄], nats.
        mutual_information: nats; 0 for one member.
        reasons: indices into :data:`REASONS`.
    """

    entry: int
    task: str
    number: int
    question: str
    choices: tuple[str, ...]
    golds: list[int]
    mixture: tuple[float, ...]
    members: tuple[tuple[float, ...], ...]
    entropy: float
    mutual_information: float
    reasons: tuple[int, ...]


def pick_documents(entries: Sequence[Entry], budget: int) -> list[Document]:
    """Pick about ``budget`` documents over all runs, the same number for each run, top-level task and reason.

    Texts are read from the samples files again, and only those of the documents picked.
    """
    parts = sum(len(entry.run.top_level()) for entry in entries)
    each = min(_MOST, max(_FEWEST, budget // max(1, parts * len(REASONS))))
    picked = []
    for index, entry in enumerate(entries):
        chosen: dict[str, dict[int, tuple[int, ...]]] = {}
        for name in entry.run.top_level():
            predictions = entry.run.predictions(name)
            for d, reasons in _interesting(predictions, each).items():
                rows = chosen.setdefault(str(predictions.subjects[d]), {})
                rows[int(str(predictions.documents[d]).partition(":")[0])] = reasons
        for task, rows in chosen.items():
            texts = _texts(entry.run.files.get(task), set(rows))
            picked += _documents(index, task, entry.run.tasks[task], rows, texts)
    return picked


def _interesting(predictions: Predictions, each: int) -> dict[int, tuple[int, ...]]:
    """Return the reasons of every document picked, by its index."""
    p = predictions.probabilities
    scores = [predictive_entropy(p)]
    wrong = ~predictions.correct if predictions.is_gold is not None else np.zeros(p.shape[1], dtype=bool)
    scores.append(np.where(wrong, predictions.confidence, -np.inf))
    scores.append(mutual_information(p) if len(p) > 1 else np.full(p.shape[1], -np.inf))
    reasons: dict[int, tuple[int, ...]] = {}
    for reason, score in enumerate(scores):
        order = np.argsort(-score, kind="stable")[:each]
        for d in order[np.isfinite(score[order])].tolist():
            reasons[d] = (*reasons.get(d, ()), reason)
    return reasons


def _documents(
    entry: int,
    task: str,
    predictions: Predictions,
    rows: Mapping[int, tuple[int, ...]],
    texts: Mapping[int, tuple[str, tuple[str, ...]]],
) -> list[Document]:
    entropy = predictive_entropy(predictions.probabilities)
    information = mutual_information(predictions.probabilities)
    documents = []
    for d, name in enumerate(predictions.documents.tolist()):
        number = int(name.partition(":")[0])
        if number not in rows:
            continue
        c = int(predictions.counts[d])
        question, choices = texts.get(number, ("", ("",) * c))
        documents.append(
            Document(
                entry=entry,
                task=task,
                number=number,
                question=question,
                choices=(*choices, *("",) * c)[:c],
                golds=[] if predictions.is_gold is None else np.flatnonzero(predictions.is_gold[d]).tolist(),
                mixture=tuple(predictions.mixture[d, :c].tolist()),
                members=tuple(map(tuple, predictions.probabilities[:, d, :c].tolist())),
                entropy=float(entropy[d]),
                mutual_information=float(information[d]),
                reasons=rows[number],
            )
        )
    return documents


def _texts(file: str | None, wanted: set[int]) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Read the end of the context and the choices of the documents wanted."""
    texts: dict[int, tuple[str, tuple[str, ...]]] = {}
    if file is None:
        return texts
    for _, sample in iter_samples(Path(file)):
        number = sample.get("doc_id")
        if number in wanted and number not in texts:
            texts[number] = _text(sample)
            if len(texts) == len(wanted):
                break
    return texts


def _text(sample: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    requests = arguments_of(sample)
    contexts = [str(request.get("arg_0", "")) for request in requests]
    endings = [str(request.get("arg_1", "")) for request in requests]
    if len(set(contexts)) > 1 and len(set(endings)) == 1:  # the context varies, the continuation does not
        return endings[0].strip()[:_QUESTION], tuple(_end(context, _CHOICE) for context in contexts)
    question = _end(contexts[0], _QUESTION) if contexts else ""
    return question, tuple(ending.strip()[:_CHOICE] for ending in endings)


def _end(text: str, length: int) -> str:
    """Return the last part of a text: few-shot examples come first, the question last."""
    stripped = text.strip()
    return stripped if len(stripped) <= length else "…" + stripped[-length:]
