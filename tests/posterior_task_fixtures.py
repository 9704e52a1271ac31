"""A tiny model, its task and random adapters as sources of posteriors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import random_adapters
from safetensors.torch import load_file, save_file
from train_fixtures import make_model, make_task

from lm_eval_lora_ensemble.ensemble.members import find_ensemble
from lm_eval_lora_ensemble.posterior.contract import Posterior, Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.data import TaskData
from lm_eval_lora_ensemble.posterior.options import resolve
from lm_eval_lora_ensemble.posterior.registry import METHODS


def make_place(place: Path, *, tied: bool = True, **lora: object) -> Path:
    """Write a base, tasks and two adapters into ``place``."""
    make_model(place / "base", tie_word_embeddings=tied)
    tasks = place / "tasks"
    make_task(tasks, "colours", test=5)
    make_task(tasks, "judged_on_validation")
    make_task(tasks, "generating", output_type="generate_until", doc_to_choice=None, test=5)
    letters = (
        "{{['a', 'b', 'c', 'd', 'e'][:choices | length]}}"  # one token each, as the byte-level tokenizer cuts
    )
    make_task(tasks, "letters", test=5, doc_to_choice=letters, target_delimiter="")
    random_adapters(place / "base", place / "adapters", 2, **{"spread": 0.1, **lora})
    return place


def source_of(*folders: Path) -> Source:
    """Read adapter folders as the command does."""
    adapters = []
    ensemble = find_ensemble([str(folder) for folder in folders])
    for member in ensemble.members:
        config = json.loads((member.folder / "adapter_config.json").read_text())
        state = load_file(member.folder / "adapter_model.safetensors")
        adapters.append(SourceAdapter(member.name, member.folder, member.sha256, config, state))
    return Source(ensemble.base_model, ensemble.revision, tuple(adapters))


def data_of(place: Path, source: Source, task: str = "colours", **options: object) -> TaskData:
    arguments = {"dtype": "float32", "device": "cpu", "batch_size": 8}
    return TaskData(source, task, model_args=arguments, include_path=str(place / "tasks"), **options)


def fit(method: str, source: Source, data: TaskData | None, **given: object) -> Posterior:
    """Fit a method with its own defaults, as the command does."""
    chosen = METHODS.find(method)
    return chosen.fit(source, data, **resolve(chosen.options, given, method))


def write_adapter(folder: Path, source: Source, state: dict[str, torch.Tensor]) -> Path:
    """Write a drawn adapter as a plain PEFT folder."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(source.adapters[0].config))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
