"""The arguments of ``--model lora-ensemble``, checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from lm_eval_lora_ensemble.errors import EnsembleError, nearest
from lm_eval_lora_ensemble.generation.mixture import GENERATION_AVERAGES
from lm_eval_lora_ensemble.scoring.loglikelihood import AVERAGES

_CHOICES = {"average": AVERAGES, "generation_average": GENERATION_AVERAGES}
_COUNTS = ("members", "epoch")
_FLAGS = ("uncertainty_metrics", "allow_base_mismatch")
_INSTEAD_OF_ADAPTERS = ("peft", "delta")
# what is not ours goes to transformers, which takes many more names than lm-eval lists
_ALIKE = 0.85


def check_arguments(own: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Refuse what would fail late, in somebody else's words, or change a number without a word.

    Args:
        own: the arguments that ``hf`` does not have, but for ``pretrained`` and ``adapters``, by name.
        others: what goes on to lm-eval's model and, where that does not know it, to transformers.

    Raises:
        EnsembleError: a value of another kind, or a name that is nearly one of ours or lm-eval's.
    """
    for name in _INSTEAD_OF_ADAPTERS:
        if others.get(name):
            raise EnsembleError(f"{name}= does not go with lora-ensemble; name adapters with adapters=")
    for name, options in _CHOICES.items():
        if own[name] not in options:
            raise EnsembleError(f"{name}={own[name]}: use one of {', '.join(options)}")
    for name in _COUNTS:
        value = own[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise EnsembleError(f"{name}={value}: give a whole number")
    for name in _FLAGS:
        if not isinstance(own[name], bool):
            raise EnsembleError(f"{name}={own[name]}: give True or False")
    _check_batch_size(others.get("batch_size", 1))
    _check_device(others.get("device"))
    known = {*own, "adapters", *inspect.signature(HFLM.__init__).parameters} - {"self", "kwargs"}
    for name in others.keys() - known:
        meant = nearest(name, known, cutoff=_ALIKE)
        if meant is not None:
            raise EnsembleError(f"there is no argument {name}; did you mean {meant}?")


def _check_batch_size(value: Any) -> None:
    """Take what HFLM takes: a whole number above 0, ``auto``, or ``auto:N``."""
    words = str(value).split(":")
    if words[0] == "auto":
        return
    if not words[0].isdecimal() or int(words[0]) < 1:
        raise EnsembleError(f"batch_size={value}: give a whole number above 0, or auto")


def _check_device(value: Any) -> None:
    """Refuse a name that is no device's: lm-eval would take another one. It also decides where a GPU is missing."""
    if value is None:
        return
    try:
        torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise EnsembleError(
            f"device={value}: torch has no such device; give cuda, cuda:0, mps or cpu"
        ) from error
