"""A tiny language model, its tokenizer and a small lm-eval task, made in the test's own folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from lm_eval_lora_ensemble.ensemble.writer import member_name
from lm_eval_lora_ensemble.harness import rendering
from lm_eval_lora_ensemble.train.folder import EnsembleFolder
from lm_eval_lora_ensemble.train.recipe import Recipe
from lm_eval_lora_ensemble.train.trainer import Trainer


def quick(patch: pytest.MonkeyPatch) -> None:
    """Leave lm-eval's thousands of own tasks out of the index, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    patch.setattr(
        rendering, "_task_manager", lambda path: TaskManager(include_path=path, include_defaults=False)
    )


@pytest.fixture(autouse=True)
def quick_tasks(monkeypatch):
    quick(monkeypatch)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices on shared cores: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


COLOURS = ["red", "green", "blue", "yellow", "dark orange", "light grey"]
THINGS = ["apple", "leaf", "sky", "sun", "carrot", "stone", "river", "old wooden boat", "cloud", "lamp"]


def documents(count: int, offset: int = 0) -> list[dict[str, Any]]:
    """Questions of different lengths with choices of different lengths and numbers."""
    docs = []
    for i in range(offset, offset + count):
        thing = THINGS[i % len(THINGS)]
        choices = [COLOURS[(i + j) % len(COLOURS)] for j in range(3 + i % 3)]
        question = f"What colour is the {thing}" + " over there" * (i % 4) + "?"
        docs.append({"question": question, "choices": choices, "gold": i % len(choices)})
    return docs


def make_task(
    folder: Path,
    name: str = "tiny_colours",
    train: int = 44,
    validation: int = 12,
    test: int = 0,
    **config: Any,
) -> Path:
    """Write a multiple-choice task over local JSON and return the folder to include.

    Without ``test`` documents lm-eval evaluates it on the validation split, or else on the training split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    counts = {"train": (train, 0), "validation": (validation, 1000), "test": (test, 2000)}
    for split, (count, offset) in counts.items():
        if count:
            path = folder / f"{name}_{split}.jsonl"
            path.write_text("".join(json.dumps(doc) + "\n" for doc in documents(count, offset)))
            files[split] = str(path)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "output_type": "multiple_choice",
        "training_split": "train" if train else None,
        "validation_split": "validation" if validation else None,
        "test_split": "test" if test else "validation" if validation else "train",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **config}))
    return folder


def make_model(folder: Path, kind: str = "llama", seed: int = 0, **config: Any) -> Path:
    """Write a random two-layer model and a byte-level BPE tokenizer trained on the task's words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.dumps(doc) for doc in documents(60)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(fast),
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        **config,
    }
    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}
    config_class, model_class = classes[kind]
    model_class(config_class(**sizes)).save_pretrained(folder)
    return folder


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    """A recipe over the tiny model and task in ``folder``, which are made on first use."""
    if not (folder / "base").exists():
        make_model(folder / "base")
        make_task(folder / "tasks")
    values = {
        "base_model": str(folder / "base"),
        "task": "tiny_colours",
        "include_path": str(folder / "tasks"),
        "output": str(folder / "ensemble"),
        "members": 2,
        "objective": "choices",
        "learning_rate": 5e-3,
        "batch_size": 8,
        "dtype": "float32",
        "device": "cpu",
    }
    return Recipe.from_mapping({**values, **changes})


def make_trainer(recipe: Recipe, members: Sequence[int] | None = None) -> Trainer:
    """A trainer of some members (default: all) that has not begun."""
    indices = range(recipe.members) if members is None else members
    seeds = {member_name(i): recipe.seed + i for i in indices}
    return Trainer(recipe, EnsembleFolder(recipe), seeds, torch.device("cpu"))


def train_steps(trainer: Trainer, steps: int) -> dict[str, dict[str, torch.Tensor]]:
    """Take optimiser steps without writing anything; return every member's weights."""
    engine, step = trainer.engine, 0
    for epoch in range(1, steps + 1):
        for batches in trainer.order.epoch(epoch, list(trainer.members.values())):
            engine.step(batches, step, engine.names)
            step += 1
            if step == steps:
                return {name: engine.weights(name) for name in engine.names}
    raise AssertionError("no steps")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)
