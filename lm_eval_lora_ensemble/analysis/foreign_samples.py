"""Samples that do not say what was known when they were written: other models' runs, and older files.

Their gold answer and the class "other" are inferred from what lm-eval logs, and only as far as one answer is possible.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray
from lm_eval_lora_ensemble.metrics.predictions import Predictions

_NLL_TOLERANCE = 1e-6


def arguments_of(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the requests' arguments in order of the choices."""
    arguments = sample.get("arguments")
    if not isinstance(arguments, Mapping):
        return []
    return [arguments[key] for key in sorted(arguments, key=lambda k: int(k.rsplit("_", 1)[-1]))]


def single_model_scores(sample: Mapping[str, Any]) -> list[float] | None:
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


@dataclass(frozen=True)
class NumberTarget:
    """What a target that is a whole number may mean: a choice's place, or the choice whose text it is.

    Attributes:
        by_place: the gold choice, −1 where there is no such place.
        by_text: the gold choice, −1 where no choice, or more than one, has that text.
        place_fits: whether the logged accuracies allow the first; asked only where there is the second.
        text_fits: whether they allow the second.
    """

    by_place: int
    by_text: int
    place_fits: bool
    text_fits: bool


def number_target(sample: Mapping[str, Any], scores: FloatArray) -> NumberTarget | None:
    """Return both readings of a sample's target; None if it is no whole number."""
    target, c = str(sample.get("target", "")).strip(), scores.shape[1]
    if not re.fullmatch(r"\d+", target):
        return None
    place = int(target) if int(target) < c else -1
    texts = _texts(sample, c)
    text = texts.index(target) if texts.count(target) == 1 else -1
    if text < 0:  # as in nearly every file; what accuracies say of a place alone is asked with the golds
        return NumberTarget(place, text, place >= 0, text_fits=False)
    return NumberTarget(
        place, text, *(gold >= 0 and _allowed(sample, gold, scores) for gold in (place, text))
    )


def _allowed(sample: Mapping[str, Any], gold: int, scores: FloatArray) -> bool:
    """Whether the logged ``acc`` and ``acc_norm`` are those of this gold choice, as far as they are known."""
    c = scores.shape[1]
    chosen = {"acc": _chosen(sample, c)}
    lengths = inferred_lengths(sample, c).get("chars")
    if lengths and min(lengths) > 0:
        chosen["acc_norm"] = int(np.argmax(scores[0] / lengths))
    return all(
        sample.get(metric) not in (0, 1) or choice < 0 or (choice == gold) == bool(sample[metric])
        for metric, choice in chosen.items()
    )


def inferred_golds(sample: Mapping[str, Any], scores: FloatArray) -> tuple[list[int], str]:
    """Return the indices of the gold choices, or none and why they are unknown.

    ``target`` is what the task's doc_to_target gave, as a string: an index, a choice's text, or a list of indices.
    Where the contexts vary and the continuation does not, it is neither; then the logged scores have to tell. Whether
    numbers are indices or texts is a question to the whole file (:func:`number_target`): here they are indices.
    """
    target, c = str(sample.get("target", "")).strip(), scores.shape[1]
    golds = _listed(target, c) if target.startswith("[") else _single(target, sample, scores)
    if not golds:
        return [], f"target {target[:40]!r} is neither an index nor one of the {c} choices"
    acc = sample.get("acc")
    if isinstance(acc, float) and acc not in (0, 1):
        return [], f"acc is {acc:.3g}, neither right nor wrong; the task has its own scoring"
    chosen = _chosen(sample, c) if acc in (0, 1) else -1
    if chosen >= 0 and (chosen in golds) != bool(acc):
        said = " and ".join(map(str, golds))
        return [], f"target says choice {said} is right, acc says otherwise; the task has its own scoring"
    return golds, ""


def _listed(target: str, c: int) -> list[int]:
    try:
        listed = ast.literal_eval(target)
    except (ValueError, SyntaxError):
        return []
    if not isinstance(listed, list):
        return []
    indices = {int(item) for item in listed if isinstance(item, int) or re.fullmatch(r"\d+", str(item))}
    return sorted(index for index in indices if 0 <= index < c)


def _single(target: str, sample: Mapping[str, Any], scores: FloatArray) -> list[int]:
    c = scores.shape[1]
    texts = _texts(sample, c)
    if re.fullmatch(r"\d+", target) and int(target) < c:
        return [int(target)]
    if texts.count(target) == 1:
        return [texts.index(target)]
    gold = _gold_from_scores(sample, scores) if len(set(texts)) < len(texts) else -1
    return [gold] if gold >= 0 else []


def _texts(sample: Mapping[str, Any], c: int) -> list[str]:
    return [str(argument.get("arg_1", "")).strip() for argument in arguments_of(sample)][:c]


def inferred_lengths(sample: Mapping[str, Any], c: int) -> dict[str, list[float]]:
    """Return the choices' lengths in characters and bytes, the delimiter before them left out; empty if unknown."""
    arguments = arguments_of(sample)[:c]
    if len(arguments) < c or len({argument.get("arg_0") for argument in arguments}) > 1:
        return {}  # contexts vary, the continuation is the same
    texts = [str(argument.get("arg_1", "")).lstrip() for argument in arguments]
    return {
        "chars": [float(len(text)) for text in texts],
        "bytes": [float(len(text.encode())) for text in texts],
    }


def _chosen(sample: Mapping[str, Any], c: int) -> int:
    """Return the choice that lm-eval's acc looked at, or −1."""
    values = single_model_scores(sample)
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


def other_is_inferred(build: Callable[[bool], Predictions], logged: FloatArray) -> bool:
    """Return whether the logged nll follows from the scores only with the class "other".

    Args:
        build: makes the predictions with "other" or without.
        logged: (D,) nll as logged, NaN where it was not.
    """
    if not differs_from_logged(build(False), logged).any():
        return False
    try:
        return not differs_from_logged(build(True), logged).any()
    except EnsembleError:
        return False


def differs_from_logged(predictions: Predictions, logged: FloatArray) -> BoolArray:
    """Return (D,): where the logged nll (NaN: there is none) is not that of the predictions."""
    if predictions.is_gold is None:
        return np.zeros(len(logged), dtype=np.bool_)
    nll = -predictions.log_gold_mass
    # within rounding of the sums, relatively for answers that were thought all but impossible
    same = np.isclose(nll, logged, rtol=_NLL_TOLERANCE, atol=_NLL_TOLERANCE)
    return ~(same | np.isnan(logged))
