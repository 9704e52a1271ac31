"""May this model use tree rows? What its configuration says; :mod:`.trial` proves it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

# layers of other kinds (recurrent ones, linear attention) see a row in order, whatever the mask says
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# these take a 4-D mask; others (flash, flex) would ignore or refuse it
MASKED_ATTENTION = ("sdpa", "eager")


def why_no_tree(model: Any, longest: int) -> str | None:
    """Say why tree rows would not be exact for ``model``, or None.

    Args:
        model: a transformers model, wrapped by PEFT or not.
        longest: tokens of the longest sequence that a row will hold.
    """
    return next(_obstacles(model, longest), None)


def _obstacles(model: Any, longest: int) -> Iterator[str]:
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = causal.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        yield "the model is an encoder-decoder"
    if not hasattr(causal, "get_decoder") or causal.get_output_embeddings() is None:
        yield "the model has no separate decoder and head"
    if any(_rounds_by_batch(module) for module in causal.modules()):
        yield "8-bit layers treat outliers by what else is in the batch; llm_int8_threshold=0.0 turns that off"
    adapters = getattr(model, "peft_config", {}).values()
    kinds = {str(getattr(adapter.peft_type, "value", adapter.peft_type)) for adapter in adapters}
    if not kinds <= {"LORA"}:
        yield f"adapters of type {', '.join(sorted(kinds - {'LORA'}))} are not LoRA"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in MASKED_ATTENTION:
        yield f"attention {attention!r} takes no 4-D mask; use attn_implementation=sdpa"
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        yield f"layers of type {', '.join(sorted(others))} are not attention"
    if (
        getattr(config, "alibi", False)
        or "position_ids" not in inspect.signature(type(causal).forward).parameters
    ):
        yield "the model takes no position ids"
    window = getattr(config, "sliding_window", None)
    if window is not None and longest > window and getattr(config, "use_sliding_window", True):
        yield f"sequences of up to {longest} tokens reach beyond the sliding window of {window}"


def _rounds_by_batch(module: Any) -> bool:
    """Whether a layer is LLM.int8's with outliers on: a column is split off if any row of the batch has one there."""
    state = getattr(module, "state", None)  # PEFT's layer around it has the same name and no state
    return type(module).__name__ == "Linear8bitLt" and getattr(state, "threshold", 0.0) > 0
