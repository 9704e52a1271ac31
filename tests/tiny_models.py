"""Tiny random models of several architectures and their random adapters, on token ids alone: no files, no tokenizer."""

from __future__ import annotations

import functools

import torch
import transformers
from peft import LoraConfig, get_peft_model

VOCABULARY = 120
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=64),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=12, sliding_window=64),
    # five sliding layers and a full one by default: three layers would all be of one kind
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=12,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
}
# Gemma 2 has no SDPA in transformers and runs eager by default
WAYS = [(name, way) for name in CONFIGS for way in ("sdpa", "eager") if (name, way) != ("gemma2", "sdpa")]


def tiny(architecture: str, attention: str = "eager", dtype: torch.dtype = torch.float32, **changes: object):
    """Make a causal model of a few thousand parameters with peaked, well separated distributions."""
    config = CONFIGS[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    config._attn_implementation = attention
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.to(dtype).eval()


def with_adapters(model, n_members: int = 2, **lora: object):
    """Put random adapters ``member_0`` … on a model and return the ``PeftModel``."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora}
    adapted = None
    for member in range(n_members):
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name="member_0")
        else:
            adapted.add_adapter(f"member_{member}", config)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return adapted.eval()


def compute_in_float64(model, patch) -> None:
    """Take the float32 out of transformers' norms and eager softmax, so that float64 is float64 all through.

    Rotary embeddings stay float32: they are one function of the position, whichever way a token is laid out.
    """

    def norm(module, x):
        scale = (
            module.weight if hasattr(module, "variance_epsilon") else 1 + module.weight
        )  # Gemma's are around 0
        epsilon = getattr(module, "variance_epsilon", None) or module.eps
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * scale

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            patch.setattr(module, "forward", functools.partial(norm, module))
    softmax = torch.nn.functional.softmax
    patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
