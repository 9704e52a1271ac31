"""What the scoring benchmarks run: a base model of a shape, adapters, and requests, real or of a benchmark's form.

Nothing here imports the package, so that another checkout's engine can run the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peak import meta_model
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

# (shared prefix, context, choices, tokens a choice, documents): like MMLU 5-shot and ARC-Challenge 25-shot
SYNTHETIC = {"mmlu": (520, 110, 4, 1, 256), "arc": (0, 1050, 4, 6, 48), "hellaswag": (0, 60, 4, 30, 128)}


class RandomWeights:
    """Stands in for ``AutoModelForCausalLM`` where a shape is measured: same configuration, random weights."""

    @staticmethod
    def from_pretrained(folder: str, *, dtype: Any = None, device_map: Any = None, **_: Any) -> Any:
        """Initialise the model of ``folder``'s configuration where it will run."""
        where = device_map[""] if isinstance(device_map, dict) else "cpu"
        torch.manual_seed(0)
        with torch.device(where):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def with_random_weights(model_class: type) -> type:
    """Return a subclass of an lm-eval model that loads no weights."""
    return type(model_class.__name__, (model_class,), {"AUTO_MODEL_CLASS": RandomWeights})


def random_adapters(config: Any, base: str, folder: Path, members: int) -> Path:
    """Write N random LoRA adapters (r 8, α 32, q_proj and v_proj) without loading the base model."""
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = get_peft_model(meta_model(config), lora)
    lora.base_model_name_or_path = base  # get_peft_model put the meta model's own name, None
    shapes = {name: value.shape for name, value in get_peft_model_state_dict(model).items()}
    for member in range(members):
        draw = torch.Generator().manual_seed(member)
        target = folder / f"member_{member:02d}"
        target.mkdir(parents=True)
        save_file(
            {name: torch.randn(shape, generator=draw) * 0.02 for name, shape in shapes.items()},
            target / "adapter_model.safetensors",
        )
        lora.save_pretrained(target)
    return folder


def items(tasks: str, synthetic: str) -> list[str]:
    """Return the names of the request sets that a command line asks for."""
    return [
        *filter(None, tasks.split(",")),
        *(f"synthetic {kind}" for kind in filter(None, synthetic.split(","))),
    ]


def requests_of(item: str, lm: Any) -> list[Any]:
    """Return the encoded requests of a set: ``NAME:SHOTS:DOCUMENTS`` or ``synthetic KIND[:DOCUMENTS]``."""
    if item.startswith("synthetic "):
        kind, _, documents = item.removeprefix("synthetic ").partition(":")
        vocabulary = min(lm.config.get_text_config().vocab_size, len(lm.tokenizer))
        return synthetic_requests(kind, vocabulary, int(documents) if documents else None)
    name, shots, documents = item.split(":")
    return lm_eval_requests(lm, name, int(shots), int(documents))


def lm_eval_requests(lm: Any, task: str, shots: int, documents: int) -> list[Any]:
    """Return the encoded requests of an lm-eval task, as ``TemplateLM.loglikelihood`` makes them."""
    from lm_eval.tasks import TaskManager

    (loaded,) = TaskManager().load([task])["tasks"].values()
    loaded.set_config("num_fewshot", shots)
    loaded.set_fewshot_seed(1234)
    loaded.build_all_requests(limit=documents, rank=0, world_size=1)
    return [(r.args, *lm._encode_pair(*r.args)) for r in loaded.instances]


def synthetic_requests(kind: str, vocabulary: int, documents: int | None = None) -> list[Any]:
    """Return random token requests of a benchmark's form; by default as many documents as are typical of it."""
    prefix, context, choices, length, usual = SYNTHETIC[kind]
    draw = np.random.default_rng(0)
    shared = draw.integers(0, vocabulary, prefix).tolist()
    requests = []
    for _ in range(documents or usual):
        document = shared + draw.integers(0, vocabulary, context).tolist()
        requests += [(None, document, draw.integers(0, vocabulary, length).tolist()) for _ in range(choices)]
    return requests
