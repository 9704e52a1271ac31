"""May this model use tree rows? What its configuration says; :mod:`.trial` proves it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import chain
from typing import Any

# layers of other kinds (recurrent ones, linear attention) see a row in order, whatever the mask says
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# these take a 4-D mask; others (flash, flex) would ignore or refuse it
MASKED_ATTENTION = ("sdpa", "eager")
# these compute their frequencies from the longest position of a forward pass, once it is beyond what was trained
STRETCHED_ROTARY = {"dynamic", "longrope"}


def why_no_tree(model: Any, longest: int) -> str | None:
    """Say why tree rows under a 4-D mask would not be exact for ``model``, or None.

    Args:
        model: a transformers model, wrapped by PEFT or not.
        longest: tokens of the longest sequence that a row will hold.
    """
    return next(chain(_obstacles(model, longest), _obstacles_to_masks(model, longest)), None)


def why_no_segments(model: Any, longest: int) -> str | None:
    """Say why a stream of tree tokens whose attention is replaced would not be exact for ``model``, or None.

    A sliding window is no obstacle to it: whether the model tells its attention of the window shows in the trial.

    Args:
        model: a transformers model, wrapped by PEFT or not.
        longest: tokens of the longest sequence.
    """
    return next(chain(_obstacles(model, longest), _obstacles_to_segments(model)), None)


def sliding_window(model: Any) -> int | None:
    """Return the sliding window that a model's configuration says is in use, in positions."""
    config = _causal(model).config.get_text_config()
    window: int | None = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _obstacles(model: Any, longest: int) -> Iterator[str]:
    causal = _causal(model)
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
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        yield f"layers of type {', '.join(sorted(others))} are not attention"
    if (
        getattr(config, "alibi", False)
        or "position_ids" not in inspect.signature(type(causal).forward).parameters
    ):
        yield "the model takes no position ids"
    stretched = STRETCHED_ROTARY & _rotary_types(config)
    original = _trained_length(config)
    if original is None:
        original = longest
    if stretched and longest > original:
        yield (
            f"{stretched.pop()} rotary embeddings of a batch depend on its longest sequence, here {longest} tokens "
            f"where {original} were trained"
        )


def _obstacles_to_masks(model: Any, longest: int) -> Iterator[str]:
    attention = getattr(_causal(model).config.get_text_config(), "_attn_implementation", None)
    if attention not in MASKED_ATTENTION:
        yield f"attention {attention!r} takes no 4-D mask; use attn_implementation=sdpa"
    window = sliding_window(model)
    if window is not None and longest > window:
        yield f"sequences of up to {longest} tokens reach beyond the sliding window of {window}"


def _obstacles_to_segments(model: Any) -> Iterator[str]:
    causal = _causal(model)
    if not getattr(causal, "_supports_attention_backend", False):
        yield f"the attention of {type(causal).__name__} cannot be replaced in transformers"


def _rotary(config: Any) -> list[dict[str, Any]]:
    """Return the settings of rotary embeddings that a configuration has, for all layers or by their type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


def _rotary_types(config: Any) -> set[str]:
    return {str(one.get("rope_type", one.get("type", "default"))) for one in _rotary(config)}


def _trained_length(config: Any) -> int | None:
    """Return up to which length rotary embeddings are what they were in training."""
    name = "original_max_position_embeddings"
    named = [one[name] for one in _rotary(config) if one.get(name)]
    named += [value for value in (getattr(config, name, None),) if value]
    return min(named) if named else getattr(config, "max_position_embeddings", None)


def _rounds_by_batch(module: Any) -> bool:
    """Whether a layer is LLM.int8's with outliers on: a column is split off if any row of the batch has one there."""
    state = getattr(module, "state", None)  # PEFT's layer around it has the same name and no state
    return type(module).__name__ == "Linear8bitLt" and getattr(state, "threshold", 0.0) > 0
