"""One ``samples_{task}_{date}.jsonl`` of lm-eval as arrays.

Runs of this backend carry every member's loglikelihoods in ``members``, the right choices in ``golds`` and whether
"other" counts in ``other_class``; any other model's run with ``--log_samples`` is an ensemble of one, and what it does
not say is inferred by :mod:`.foreign_samples`. Files are read line by line and only numbers are kept.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.analysis.answers import AnswerReader, AnswerScores, is_answer
from lm_eval_lora_ensemble.analysis.foreign_samples import (
    NumberTarget,
    differs_from_logged,
    inferred_golds,
    inferred_lengths,
    number_target,
    other_is_inferred,
    single_model_scores,
)
from lm_eval_lora_ensemble.analysis.strings import StringReader, StringScores, is_whole_string
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores
from lm_eval_lora_ensemble.metrics.crossfit import fold_of


def iter_samples(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, sample)`` of a samples file with all that lm-eval logged, texts included.

    Raises:
        EnsembleError: unreadable, or a line that is no JSON object.
    """
    try:
        with Path(path).open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    sample = json.loads(line)
                except ValueError as error:
                    raise EnsembleError(
                        f"{path}, line {number}: not JSON ({error}); "
                        "the file is cut off or damaged, run again"
                    ) from error
                if not isinstance(sample, dict):
                    raise EnsembleError(f"{path}, line {number}: not a sample of lm-eval")
                yield number, sample
    except (OSError, UnicodeDecodeError) as error:
        raise EnsembleError(f"{path} cannot be read ({error})") from error


@dataclass
class SampledDocument:
    """The numbers of one document.

    Attributes:
        key: lm-eval's doc_id and the start of its hash.
        scores: (N, C) loglikelihoods, nats.
        golds: indices of the right choices; empty where unknown.
        why_no_gold: why they are unknown.
        number: what a target that is a number may mean; None for others, and where the right choices were logged.
        nll: as logged, NaN if it was not.
        other_class: whether "other" counts as a choice; None where the file does not say.
        lengths: of each choice by unit, as far as they are known.
        fold: of a cross-fit.
        line: of the file.
    """

    key: tuple[int, str]
    scores: FloatArray
    golds: list[int]
    why_no_gold: str
    number: NumberTarget | None
    nll: float
    other_class: bool | None
    lengths: Mapping[str, list[float]]
    fold: int
    line: int


def read_task(
    path: Path,
    task: str,
    *,
    of_ensemble: bool,
    own_scoring: bool = False,
    lower_is_better: Collection[str] = (),
) -> ChoiceScores | StringScores | AnswerScores | str:
    """Read a samples file; return why it cannot be analysed if it is of no kind that can.

    In an ensemble's run a task whose samples carry no members' scores is not taken for a single model's. Where a task
    has a scoring of its own and no accuracy, its ``target`` is not taken for a right answer. No metric of
    ``lower_is_better`` says which generated texts are right.
    """
    documents: dict[int, SampledDocument] = {}
    strings: StringReader | None = None
    answers: AnswerReader | None = None
    wanted: str | None = None
    for number, sample in iter_samples(path):
        if answers or (not documents and not strings and is_answer(sample)):
            answers = answers or AnswerReader(path, lower_is_better)
            answers.add(sample, number)
            continue
        # Several filters log every document several times; the first one is the task's main one.
        wanted = sample.get("filter", "none") if wanted is None else wanted
        if sample.get("filter", "none") != wanted:
            continue
        if of_ensemble and "members" not in sample:
            return "its samples carry no members' scores: --predict_only, uncertainty_metrics=False, or release 0.1"
        if strings or (not documents and is_whole_string(sample)):
            strings = strings or StringReader(path)
            strings.add(sample, number)
            continue
        scores = _scores(sample, f"{path}, line {number}")
        if isinstance(scores, str):
            return scores
        document = _document(sample, scores, number, path, own_scoring=own_scoring)
        if document.key[0] in documents:
            raise EnsembleError(
                f"{path}, line {number}: document {document.key[0]} occurs twice; "
                "two runs were written to one file"
            )
        _check_alike(document, next(iter(documents.values()), document), path)
        documents[document.key[0]] = document
    if answers:
        return answers.scores()
    if strings:
        return strings.scores()
    if not documents:
        raise EnsembleError(f"{path} holds no sample")
    # Ranks of a distributed run write their documents one rank after another.
    return _assemble(_numbers_read([documents[key] for key in sorted(documents)]), task, path)


def _numbers_read(documents: list[SampledDocument]) -> list[SampledDocument]:
    """Read targets that are numbers as what the whole file allows: all as choices' places, or all as their texts.

    Places are the rule. Where some number is another choice's text as well, accuracies, and numbers that can be one of
    the two only, have to tell.
    """
    numbers = [document.number for document in documents if document.number is not None]
    if all(number.by_text in (-1, number.by_place) or number.by_place < 0 for number in numbers):
        return documents
    places, texts = all(n.place_fits for n in numbers), all(n.text_fits for n in numbers)
    if places and not texts:
        return documents
    if texts and not places:
        return [
            document
            if document.number is None
            else replace(document, golds=[document.number.by_text], why_no_gold="")
            for document in documents
        ]
    why = "targets are numbers, and nothing says whether they are choices' places or their texts"
    return [replace(document, golds=[], why_no_gold=why) for document in documents]


def _check_alike(document: SampledDocument, first: SampledDocument, path: Path) -> None:
    """Refuse a file that was put together from two runs."""
    if len(document.scores) != len(first.scores):
        raise EnsembleError(
            f"{path}, line {document.line}: {len(document.scores)} members, {len(first.scores)} before; "
            "samples of two ensembles were mixed"
        )
    if document.other_class != first.other_class:
        raise EnsembleError(
            f"{path}, line {document.line}: other_class is {document.other_class}, {first.other_class} before; "
            "two runs were written to one file"
        )


def _scores(sample: Mapping[str, Any], place: str) -> FloatArray | str:
    """Return the loglikelihoods (N, C) of a sample, or why it has none."""
    values: Any = sample.get("members")
    if values is None:
        single = single_model_scores(sample)
        if single is None:
            return "not a multiple-choice task: its samples hold no loglikelihood for each choice"
        values = [single]
    try:
        scores = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EnsembleError(
            f"{place}: members is not a table of numbers, members by choices ({error})"
        ) from error
    if scores.ndim != 2 or not len(scores):
        raise EnsembleError(f"{place}: members has shape {scores.shape}; members by choices is needed")
    if scores.shape[1] < 2:
        return f"its documents have {scores.shape[1]} choice; at least two are needed"
    if np.isfinite(scores).all():
        return scores
    if np.isnan(scores).any() or (scores == np.inf).any():
        raise EnsembleError(
            f"{place}: a loglikelihood is NaN or infinite; score again in float32 or bfloat16"
        )
    if np.isneginf(scores).all(axis=1).any():
        raise EnsembleError(f"{place}: every choice has loglikelihood -inf; no distribution follows")
    return scores


def _document(
    sample: Mapping[str, Any], scores: FloatArray, number: int, path: Path, *, own_scoring: bool
) -> SampledDocument:
    try:
        document = int(sample["doc_id"])
        # where the task reports an nll of its own, ours has another name
        nll = sample.get("ensemble_nll", sample.get("nll"))
        logged, unknown = "golds" in sample, own_scoring and "acc" not in sample
        if logged:
            golds, why = _logged_golds(sample, scores)
        elif unknown:
            golds, why = [], "the task scores answers by a rule of its own"
        else:
            golds, why = inferred_golds(sample, scores)
        other = sample.get("other_class")
        return SampledDocument(
            key=(document, str(sample.get("doc_hash", ""))[:16]),
            scores=scores,
            golds=golds,
            why_no_gold="" if golds else f"{path}, line {number}: {why}",
            number=None if logged or unknown else number_target(sample, scores),
            nll=float("nan") if nll is None else float(nll),
            other_class=None if other is None else bool(other),
            lengths=_lengths(sample, scores.shape[1]),
            fold=fold_of(str(sample.get("doc_hash") or document)),
            line=number,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnsembleError(
            f"{path}, line {number}: not a sample of lm-eval ({type(error).__name__}: {error})"
        ) from error


def _logged_golds(sample: Mapping[str, Any], scores: FloatArray) -> tuple[list[int], str]:
    """Return the gold choices' indices as they were logged, or none and why."""
    golds = [int(gold) for gold in sample["golds"]]
    if not all(0 <= gold < scores.shape[1] for gold in golds):
        raise ValueError(f"golds {golds} are not among its {scores.shape[1]} choices")
    return golds, "" if golds else "the task scores answers by a rule of its own"


def _lengths(sample: Mapping[str, Any], c: int) -> dict[str, list[float]]:
    """Return the choices' lengths by unit, as they were logged or as the texts say."""
    logged = sample.get("lengths")
    if not isinstance(logged, Mapping):
        return inferred_lengths(sample, c)
    lengths = {str(unit): [float(value) for value in values] for unit, values in logged.items()}
    wrong = next((unit for unit, values in lengths.items() if len(values) != c), None)
    if wrong:
        raise ValueError(f"{len(lengths[wrong])} lengths in {wrong} for {c} choices")
    return lengths


def _assemble(documents: Sequence[SampledDocument], task: str, path: Path) -> ChoiceScores:
    """Pad the documents to one array, and check it against what was logged."""
    n, c = len(documents[0].scores), max(document.scores.shape[1] for document in documents)
    scores = np.full((n, len(documents), c), -np.inf)
    is_gold = np.zeros((len(documents), c), dtype=np.bool_)
    for d, document in enumerate(documents):
        scores[:, d, : document.scores.shape[1]] = document.scores
        is_gold[d, document.golds] = True
    without = [document.why_no_gold for document in documents if not document.golds]

    def build(other_class: bool) -> ChoiceScores:
        return ChoiceScores(
            scores,
            np.array([document.scores.shape[1] for document in documents]),
            None if without else is_gold,
            np.array([task] * len(documents), dtype=np.str_),
            np.array([f"{number}:{digest}" for number, digest in (document.key for document in documents)]),
            np.array([document.fold for document in documents]),
            _padded_lengths(documents, c),
            other_class,
            without[0] if without else "",
        )

    logged = np.array([document.nll for document in documents])
    known = documents[0].other_class
    if known is None:
        known = other_is_inferred(lambda other: build(other).per_unit(), logged)
    assembled = build(known)
    off = differs_from_logged(assembled.per_unit(), logged)
    if off.any():
        raise EnsembleError(
            f"{path}, line {documents[int(np.argmax(off))].line}: the logged nll does not follow from the scores; "
            "the file was edited or put together from two runs"
        )
    return assembled


def _padded_lengths(documents: Sequence[SampledDocument], c: int) -> dict[str, FloatArray]:
    """Return (D, C) lengths in each unit that all documents know."""
    units = set.intersection(*(set(document.lengths) for document in documents))
    padded = {unit: np.zeros((len(documents), c)) for unit in sorted(units)}
    for unit, lengths in padded.items():
        for d, document in enumerate(documents):
            lengths[d, : len(document.lengths[unit])] = document.lengths[unit]
    return padded
