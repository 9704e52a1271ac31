"""Warnings that are ours to mend end a test."""

import warnings

import pytest


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_a_name_that_goes_away_is_an_error_in_our_modules(kind):
    def warn(module):
        warnings.warn_explicit("old is now new", kind, "file.py", 1, module=module)

    for module in ("lm_eval_lora_ensemble.train.engine", "lm_eval_lora_ensemble.harness.model"):
        with pytest.raises(kind):
            warn(module)


def test_transformers_old_name_for_checkpointing_is_an_error():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(FutureWarning, match="activation_checkpointing_enable"):
        model.gradient_checkpointing_enable()
