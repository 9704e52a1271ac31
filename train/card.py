"""The README.md of a member's adapter folder."""

from __future__ import annotations

from pathlib import Path

from lm_eval_lora_ensemble.train.recipe import Recipe

_CARD = """---
base_model: {base}
library_name: peft
tags:
- lora
- lm-eval-lora-ensemble
---

# {name} of {members}

A LoRA adapter on `{base}`, one of {members} members of an ensemble. Alone it is an ordinary PEFT adapter:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")
```

| | |
|---|---|
| Trained on | the training split of {task} (lm-eval), objective `{objective}` |
| Seed | {seed} |
| Adapter | rank {rank}, alpha {alpha:g}, dropout {dropout:g}, on {modules} |
| Optimiser | {optimiser}, learning rate {learning_rate:g}, weight decay {weight_decay:g}, λ of ‖B·A‖² {lora_l2:g} |
| Trained for | {epochs} epochs, {steps} steps of {documents} documents |

{posterior}The members differ in their seed alone. `recipe.yaml` holds every setting; the ensemble is evaluated with
`lm_eval --model lora-ensemble --model_args adapters=FOLDER`, where FOLDER is the folder above this one.
The base model's licence and limits apply. The member has not been evaluated beyond metrics.jsonl there.
"""

_OPTIMISERS = {"adamw": "AdamW", "ivon": "IVON", "blob": "AdamW on BLoB's bound"}

_POSTERIOR = """It is the mean of a Gaussian, whose spread is in `posterior.safetensors`;
`lora-ensemble draw {method}` draws from it.

"""


def model_card(recipe: Recipe, base: str, name: str, *, seed: int, epochs: int, steps: int) -> str:
    """Return the model card of one member.

    Args:
        recipe: what it was trained by.
        base: the base model's Hub id or folder.
        name: the member's.
        seed: the member's.
        epochs: epochs behind these weights, the last perhaps in part.
        steps: optimiser steps behind them.
    """
    modules = recipe.target_modules
    variational = recipe.variational
    return _CARD.format(
        base=Path(base).name if Path(base).is_absolute() else base,
        name=name,
        members=recipe.members,
        seed=seed,
        epochs=epochs,
        steps=steps,
        task=", ".join(recipe.task),
        objective=recipe.objective,
        rank=recipe.rank,
        alpha=recipe.alpha,
        dropout=recipe.dropout,
        optimiser=_OPTIMISERS[variational or "adamw"],
        posterior=_POSTERIOR.format(method=variational) if variational else "",
        modules=modules if isinstance(modules, str) else ", ".join(modules),
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        lora_l2=recipe.lora_l2,
        documents=recipe.batch_size * recipe.gradient_accumulation,
    )
