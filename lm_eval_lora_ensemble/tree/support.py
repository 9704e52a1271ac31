"""Whether the packed path is exact for a model: what its configuration says, and a trial that proves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lm_eval_lora_ensemble.scoring.forward import PackedModel
from lm_eval_lora_ensemble.scoring.packed import PackedScorer
from lm_eval_lora_ensemble.tree.requests import TokenRequest

# Largest difference of a token's log-probability between two orders of the same floating-point operations.
# Measured on short sequences: below 1e-5 in float32, around 0.05 in bfloat16. A wrong mask costs whole nats.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 0.3


def why_not(model: Any, longest: int) -> str | None:
    """Say why packed rows would not be exact for ``model``, or None.

    Args:
        model: the model with its adapters.
        longest: tokens of the longest sequence to score.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = causal.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "the model is an encoder-decoder"
    kinds = {
        str(getattr(c.peft_type, "value", c.peft_type)) for c in getattr(model, "peft_config", {}).values()
    }
    if not kinds <= {"LORA"}:
        return f"adapters of type {', '.join(sorted(kinds - {'LORA'}))} are not LoRA"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attention {attention!r} takes no 4-D mask; use attn_implementation=sdpa"
    window = getattr(config, "sliding_window", None)
    if window is not None and longest > window and getattr(config, "use_sliding_window", True):
        return f"sequences of up to {longest} tokens reach beyond the sliding window of {window}"
    if not (hasattr(causal, "get_decoder") and causal.get_output_embeddings() is not None):
        return "the model has no separate decoder and head"
    return None


def shared_layers(model: Any) -> int:
    """Return how many of the lowest decoder layers no adapter touches; 0 where that cannot be told.

    Members share what these layers compute. A base model with one member gains nothing and gets 0.
    """
    if len(getattr(model, "peft_config", {})) < 2:
        return 0
    decoder = model.get_base_model().get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None or not hasattr(decoder, "norm"):
        return 0
    layer_parameters = {id(p) for p in layers.parameters()}
    for name, parameter in model.named_parameters():
        # an adapted embedding, or anything else outside the layers, changes their input
        if "lora_" in name and id(parameter) not in layer_parameters and "lm_head" not in name:
            return 0
    for i, layer in enumerate(layers):
        if any("lora_" in name for name, _ in layer.named_parameters()):
            return i
    return 0


@torch.inference_mode()
def trial_error(
    packed: PackedModel,
    activate: Callable[[int], None],
    whole_logits: Callable[[torch.Tensor], torch.Tensor],
    n_members: int,
) -> float | None:
    """Score a small tree both ways with the last member and return the difference if it is too large.

    This catches what no configuration tells: logits scaled or capped after the head, positions that do not come
    from ``position_ids``, layers that mix tokens by other means than attention.

    Args:
        packed: the model for packed rows.
        activate: makes a member active.
        whole_logits: the model as it is: int64 [1, L] token ids to [1, L, V] logits.
        n_members: number of members.
    """
    vocabulary = packed.head.weight.shape[0]
    draw = np.random.default_rng(0).integers(0, vocabulary, size=(5, 8)).tolist()
    stem, one, other, third, fourth = (tuple(part) for part in draw)
    sequences = [
        stem + one,
        stem + one[:3] + other,
        stem + third,
        stem + third[:5] + fourth,
        stem[:3] + fourth,
    ]
    requests = [TokenRequest(sequence[:-1], sequence[2:]) for sequence in sequences]
    scorer = PackedScorer(
        packed,
        lambda _: activate(n_members - 1),
        n_members=1,
        token_budget=64,
        plan_options={"max_tree_tokens": 20, "min_stem_tokens": 4},
    )
    worst = 0.0
    for index, score in scorer.score(requests):
        request = requests[index]
        worst = max(
            worst, abs(score.loglikelihoods[0] - _plain(request, whole_logits)) / len(request.targets)
        )
    tolerance = _TOLERANCE.get(packed.dtype, _HALF_TOLERANCE)
    return None if worst <= tolerance else worst


def _plain(request: TokenRequest, whole_logits: Callable[[torch.Tensor], torch.Tensor]) -> float:
    tokens = torch.tensor([request.tokens])
    log_probs = torch.log_softmax(whole_logits(tokens)[0, -len(request.targets) :].float(), dim=-1).cpu()
    return float(log_probs[range(len(request.targets)), list(request.targets)].double().sum())
