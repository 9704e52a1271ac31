"""The frozen base model, and lm-eval's own way of turning text into its tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_lora_ensemble.errors import EnsembleError, first_line
from lm_eval_lora_ensemble.precision import fast_dtype

if TYPE_CHECKING:
    import torch

    from lm_eval_lora_ensemble.train.recipe import Recipe


@dataclass
class Base:
    """A loaded base model.

    Attributes:
        model: the causal language model, in eval mode, no parameter requiring a gradient.
        encoder: lm-eval's ``HFLM`` around it; only its text encoding is used.
        name: what the adapters name as their base: a Hub id, or an absolute folder.
        max_length: the longest sequence a forward pass may see, in tokens.
    """

    model: Any
    encoder: Any
    name: str
    max_length: int

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a request exactly as lm-eval does when it scores it.

        Follows ``TemplateLM.loglikelihood``: an empty context becomes the prefix token, unless the
        continuation begins with that token already.
        """
        if context:
            return self.encoder._encode_pair(context, continuation)
        tokens = self.encoder.tok_encode(continuation, add_special_tokens=False)
        prefix = self.encoder.prefix_token_id
        return ([prefix], tokens) if tokens[:1] != [prefix] else (tokens[:1], tokens[1:])


def resolve_name(base_model: str) -> str:
    """Return the Hub id, or the absolute local folder, that ``base_model`` stands for."""
    from lm_eval_lora_ensemble.ensemble.base_model import resolve

    name = resolve(base_model)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def pick_device(wanted: str) -> torch.device:
    """Return the device for ``auto`` or a name; under ``accelerate launch``, this process's own."""
    import torch

    if wanted != "auto":
        try:
            named = torch.device(wanted)
        except RuntimeError as error:
            raise EnsembleError(
                f"device {wanted!r} is unknown to torch; give cpu, cuda, cuda:1, mps …"
            ) from error
        if named.type == "cuda" and not torch.cuda.is_available():
            raise EnsembleError(f"device {wanted!r}: torch sees no GPU here; give device=cpu")
        return named
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device


def load(recipe: Recipe, device: torch.device) -> Base:
    """Load and freeze the recipe's base model.

    Raises:
        EnsembleError: the model cannot be had, is no causal language model, or quantisation is asked for
            where bitsandbytes is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    name = resolve_name(recipe.base_model)
    options: dict[str, Any] = {"revision": recipe.revision or "main"}
    options["dtype"] = fast_dtype(device) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    if recipe.quantization != "none":
        options |= _quantization(recipe.quantization, options["dtype"], device)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise EnsembleError(
            f"base_model {recipe.base_model!r} cannot be loaded: {reason}; give a Hub id or a local folder "
            "of a causal language model"
        ) from error
    if recipe.quantization == "none":
        model = model.to(device)
    model.eval()
    model.requires_grad_(requires_grad=False)
    encoder = _encoder(model, name, recipe)
    limit = encoder.max_length
    return Base(model, encoder, name, min(recipe.max_length or limit, limit))


def _quantization(bits: str, dtype: Any, device: torch.device) -> dict[str, Any]:
    """Return the ``from_pretrained`` options for a 4-bit (NF4) or 8-bit base."""
    from lm_eval_lora_ensemble.ensemble.quantization import (
        quantization_config,
        require_bitsandbytes,
        training_arguments,
    )

    require_bitsandbytes(f"quantization={bits}", "quantization=none")
    return {
        "quantization_config": quantization_config(training_arguments(bits, dtype)),
        "device_map": {"": device},
    }


def _encoder(model: Any, name: str, recipe: Recipe) -> Any:
    """Wrap the loaded model in ``HFLM``, so that tokens are those the evaluation will see."""
    from lm_eval.models.huggingface import HFLM

    log = logging.getLogger("lm_eval.models.huggingface")
    level = log.level
    # It warns that a model that is already loaded is not for `accelerate launch`; nothing is scored with it.
    log.setLevel(logging.ERROR)
    try:
        return HFLM(pretrained=model, tokenizer=name, revision=recipe.revision or "main", batch_size=1)
    except (OSError, ValueError, KeyError) as error:
        raise EnsembleError(
            f"the tokenizer of base_model {recipe.base_model!r} cannot be loaded: {first_line(error)}"
        ) from error
    finally:
        log.setLevel(level)
