"""One ``samples_{task}_{date}.jsonl`` of lm-eval as arrays.

Runs of this backend carry every member's loglikelihoods in ``members``; any other model's run with
``--log_samples`` is an ensemble of one. Files are read line by line and only numbers are kept.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.predictions import Predictions

_NLL_TOLERANCE = 1e-6


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
class _Row:
    """The numbers of one document."""

    key: tuple[int, str]
    scores: FloatArray
    gold: int
    why_no_gold: str
    nll: float
    line: int


def read_task(path: Path, task: str, *, of_ensemble: bool) -> Predictions | str:
    """Read a samples file; return why it cannot be analysed if it is not of a multiple-choice task.

    In an ensemble's run a task whose samples carry no members' scores is not taken for a single model's.
    """
    rows: dict[int, _Row] = {}
    wanted: str | None = None
    for number, sample in iter_samples(path):
        # Several filters log every document several times; the first one is the task's main one.
        wanted = sample.get("filter", "none") if wanted is None else wanted
        if sample.get("filter", "none") != wanted:
            continue
        if of_ensemble and "members" not in sample:
            return "its samples carry no members' scores: several gold answers, or uncertainty_metrics=False"
        scores = _scores(sample, f"{path}, line {number}")
        if isinstance(scores, str):
            return scores
        row = _row(sample, scores, number, path)
        if row.key[0] in rows:
            raise EnsembleError(
                f"{path}, line {number}: document {row.key[0]} occurs twice; "
                "two runs were written to one file"
            )
        if rows and len(scores) != (n := len(next(iter(rows.values())).scores)):
            raise EnsembleError(
                f"{path}, line {number}: {len(scores)} members, {n} before; "
                "samples of two ensembles were mixed"
            )
        rows[row.key[0]] = row
    if not rows:
        raise EnsembleError(f"{path} holds no sample")
    # Ranks of a distributed run write their documents one rank after another.
    return _assemble([rows[key] for key in sorted(rows)], task, path)


def _scores(sample: Mapping[str, Any], place: str) -> FloatArray | str:
    """Return the loglikelihoods (N, C) of a sample, or why it has none."""
    values: Any = sample.get("members")
    if values is None:
        single = _single_model_scores(sample)
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


def _single_model_scores(sample: Mapping[str, Any]) -> list[float] | None:
    """Return a plain model's loglikelihoods, which lm-eval writes as pairs of strings."""
    responses = sample.get("filtered_resps")
    try:
        pairs = [(float(value), greedy) for value, greedy in responses]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        return None
    if not all(str(greedy) in ("True", "False") for _, greedy in pairs):
        return None
    values = [value for value, _ in pairs]
    half = len(values) // 2
    contexts = [argument.get("arg_0") for argument in arguments_of(sample)]
    # The metric acc_mutual_info scores every choice a second time, without its question.
    if (
        len(contexts) == len(values) == 2 * half
        and "" not in contexts[:half]
        and set(contexts[half:]) == {""}
    ):
        return values[:half]
    return values


def arguments_of(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the requests' arguments in order of the choices."""
    arguments = sample.get("arguments")
    if not isinstance(arguments, Mapping):
        return []
    return [arguments[key] for key in sorted(arguments, key=lambda k: int(k.rsplit("_", 1)[-1]))]


def _row(sample: Mapping[str, Any], scores: FloatArray, number: int, path: Path) -> _Row:
    try:
        document = int(sample["doc_id"])
        nll = sample.get("nll")
        gold, why = _gold(sample, scores)
        return _Row(
            key=(document, str(sample.get("doc_hash", ""))[:16]),
            scores=scores,
            gold=gold,
            why_no_gold="" if gold >= 0 else f"{path}, line {number}: {why}",
            nll=float("nan") if nll is None else float(nll),
            line=number,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnsembleError(
            f"{path}, line {number}: not a sample of lm-eval ({type(error).__name__}: {error})"
        ) from error


def _gold(sample: Mapping[str, Any], scores: FloatArray) -> tuple[int, str]:
    """Return the gold choice's index, or −1 and why it is unknown.

    ``target`` is what the task's doc_to_target gave, as a string: an index, or a choice's text. Where the
    contexts vary and the continuation does not, it is neither; then the logged scores have to tell.
    """
    target, c = str(sample.get("target", "")).strip(), scores.shape[1]
    texts = [str(argument.get("arg_1", "")).strip() for argument in arguments_of(sample)][:c]
    if target.startswith("["):
        try:
            listed = ast.literal_eval(target)
        except (ValueError, SyntaxError):
            listed = None
        if isinstance(listed, list) and len(listed) != 1:
            return -1, f"{len(listed)} gold answers; these metrics are defined for one"
        target = str(listed[0]) if isinstance(listed, list) else target
    gold = -1
    if re.fullmatch(r"\d+", target) and int(target) < c:
        gold = int(target)
    elif texts.count(target) == 1:
        gold = texts.index(target)
    elif len(set(texts)) < len(texts):
        gold = _gold_from_scores(sample, scores)
    if gold < 0:
        return -1, f"target {target[:40]!r} is neither an index nor one of the {c} choices"
    acc = sample.get("acc")
    chosen = _chosen(sample, c) if acc in (0, 1) else -1
    if chosen >= 0 and (chosen == gold) != bool(acc):
        return -1, f"target says choice {gold} is right, acc says otherwise; the task has its own scoring"
    return gold, ""


def _chosen(sample: Mapping[str, Any], c: int) -> int:
    """Return the choice that lm-eval's acc looked at, or −1."""
    values = _single_model_scores(sample)
    return int(np.argmax(values)) if values is not None and len(values) == c else -1


def _gold_from_scores(sample: Mapping[str, Any], scores: FloatArray) -> int:
    """Find the only choice that the logged nll or acc allow, or −1."""
    c = scores.shape[1]
    if sample.get("nll") is not None:
        losses = -Predictions.from_scores(scores[:, None, :], None).log_mixture[0]
        matches = np.flatnonzero(np.abs(losses - float(sample["nll"])) <= _NLL_TOLERANCE)
        return int(matches[0]) if len(matches) == 1 else -1
    chosen = _chosen(sample, c)
    if chosen >= 0 and sample.get("acc") == 1:
        return chosen
    return 1 - chosen if chosen >= 0 and c == 2 and sample.get("acc") == 0 else -1


def _assemble(rows: Sequence[_Row], task: str, path: Path) -> Predictions:
    """Pad the documents to one array and settle whether the class "other" belongs to them."""
    n, c = len(rows[0].scores), max(row.scores.shape[1] for row in rows)
    scores = np.full((n, len(rows), c), -np.inf)
    for d, row in enumerate(rows):
        scores[:, d, : row.scores.shape[1]] = row.scores
    without = [row.why_no_gold for row in rows if row.gold < 0]
    golds = None if without else np.array([row.gold for row in rows])

    def build(*, other_class: bool) -> Predictions:
        return Predictions.from_scores(
            scores,
            golds,
            counts=[row.scores.shape[1] for row in rows],
            subjects=task,
            documents=[f"{document}:{digest}" for document, digest in (row.key for row in rows)],
            other_class=other_class,
            missing_gold=without[0] if without else "",
        )

    logged = np.array([row.nll for row in rows])
    predictions = build(other_class=False)
    off = _disagrees(predictions, logged)
    if not off.any():
        return predictions
    try:
        with_other = build(other_class=True)
    except EnsembleError:
        with_other = None
    if with_other is not None and not _disagrees(with_other, logged).any():
        return with_other
    raise EnsembleError(
        f"{path}, line {rows[int(np.argmax(off))].line}: the logged nll does not follow from the scores; "
        "the file was edited or put together from two runs"
    )


def _disagrees(predictions: Predictions, logged: FloatArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return where the nll that was logged (NaN: none was) is not that of the predictions."""
    if predictions.gold is None:
        return np.zeros(len(logged), dtype=np.bool_)
    nll = -predictions.log_mixture[np.arange(len(logged)), predictions.gold]
    same = np.isclose(nll, logged, rtol=_NLL_TOLERANCE, atol=_NLL_TOLERANCE)
    return ~(same | np.isnan(logged))
