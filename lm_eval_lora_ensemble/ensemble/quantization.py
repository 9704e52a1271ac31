"""Quantised base models: bitsandbytes' arguments become the configuration that transformers loads them by.

``hf`` hands ``load_in_4bit=True`` and its like to ``from_pretrained``, which transformers 5 answers with a TypeError.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from lm_eval_lora_ensemble.errors import EnsembleError

if TYPE_CHECKING:
    import torch

_SWITCHES = ("load_in_4bit", "load_in_8bit")
ARGUMENTS = (
    *_SWITCHES,
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage",
    "llm_int8_threshold",
    "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
)
"""Of ``transformers.BitsAndBytesConfig``, under the names that ``--model_args`` has had for them."""


def take_arguments(model_args: MutableMapping[str, Any]) -> dict[str, Any]:
    """Take bitsandbytes' arguments out of a model's; those that are off or null are dropped."""
    taken = {name: model_args.pop(name, None) for name in ARGUMENTS}
    return {name: value for name, value in taken.items() if value is not None and value is not False}


def training_arguments(bits: str, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments by which a recipe's ``quantization`` loads its base model, as QLoRA does.

    Args:
        bits: ``4bit`` (NF4 with quantised constants) or ``8bit``.
        compute_dtype: of the products with 4-bit weights.
    """
    if bits == "8bit":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute_dtype,
    }


def quantization_config(arguments: Mapping[str, Any], declared: Any = None) -> Any:
    """Return the configuration to load a base model by.

    Args:
        arguments: some of :data:`ARGUMENTS`. Those that are left out are bitsandbytes' own defaults: FP4, no
            quantised constants, float32 products.
        declared: the configuration in the base model's own folder, where its weights are quantised already.

    Returns:
        ``declared`` where there is one, a ``transformers.BitsAndBytesConfig`` where the arguments ask for it,
        else None.

    Raises:
        EnsembleError: bitsandbytes is missing, or the arguments contradict each other or the base model.
    """
    config = _config(arguments, declared)
    if getattr(config, "load_in_8bit", False):
        _say_once("bitsandbytes.autograd._functions")
    return config


def _config(arguments: Mapping[str, Any], declared: Any) -> Any:
    if not arguments:
        return declared
    switches = [name for name in _SWITCHES if name in arguments]
    if len(switches) > 1:
        raise EnsembleError("load_in_4bit=True and load_in_8bit=True exclude each other; give one")
    if declared is not None:
        if switches and not getattr(declared, switches[0], False):
            raise EnsembleError(
                f"{switches[0]}=True, but the base model's weights are quantised already, otherwise "
                f"({getattr(declared, 'quant_method', type(declared).__name__)}); leave {switches[0]} out"
            )
        return declared
    if not switches:
        raise EnsembleError(
            f"{', '.join(arguments)} without load_in_4bit=True or load_in_8bit=True quantises nothing; give one of them"
        )
    require_bitsandbytes(f"{switches[0]}=True", "leave it out")
    from transformers import BitsAndBytesConfig

    try:
        return BitsAndBytesConfig(**arguments)
    except (ValueError, TypeError, AttributeError) as error:
        given = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise EnsembleError(f"{given}: {error}; see transformers' BitsAndBytesConfig") from error


class _Once(logging.Filter):
    """Lets each text through once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self._said
        self._said.add(text)
        return new


def _say_once(logger: str) -> None:
    """Let a library's logger say each text once: 8-bit layers warn at every product that they cast their input."""
    log = logging.getLogger(logger)
    if not any(isinstance(known, _Once) for known in log.filters):
        log.addFilter(_Once())


def require_bitsandbytes(asked: str, instead: str) -> None:
    """Refuse in one line what needs bitsandbytes where it is not installed.

    Args:
        asked: the setting that needs it.
        instead: what to do without it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnsembleError(f"{asked} needs bitsandbytes; `pip install bitsandbytes`, or {instead}")
