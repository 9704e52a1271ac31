"""A training run with kept snapshots, made of random numbers, and what its files hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lm_eval_lora_ensemble.ensemble.manifest import Manifest, MemberEntry
from lm_eval_lora_ensemble.ensemble.writer import EnsembleWriter, member_name

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def make_run(
    folder: Path, adapter: Path, *, members: int = 1, epochs: int = 6, steps: int = 0, dtype=torch.float32
) -> Path:
    """Write a run whose members drift away from ``adapter`` with noise, every snapshot kept."""
    writer = EnsembleWriter(folder, ".making", "making")
    writer.scratch.mkdir(parents=True)
    base = load_file(adapter / WEIGHTS)
    for member in range(members):
        generator = torch.Generator().manual_seed(50 + member)
        drift = {name: torch.randn(t.shape, generator=generator) * 0.02 for name, t in base.items()}
        kept: dict[str, dict[int, str]] = {"epochs": {}, "steps": {}}
        name = member_name(member)
        for unit, count, text in (("steps", steps, "step_{:08d}"), ("epochs", epochs, "epoch_{:02d}")):
            for at in range(1, count + 1):
                number = at if unit == "epochs" else at * 10
                kept[unit][number] = f"{name}/{text.format(number)}"
                place = folder / kept[unit][number]
                place.mkdir(parents=True)
                shutil.copy(adapter / CONFIG, place)
                state = {
                    key: (t + at * drift[key] + 0.05 * torch.randn(t.shape, generator=generator)).to(dtype)
                    for key, t in base.items()
                }
                save_file(state, place / WEIGHTS)
        for file in (CONFIG, WEIGHTS):
            shutil.copy(place / file, folder / name)
        writer.write_entry(MemberEntry(name=name, folder=name, seed=member, **kept))
    names = [member_name(member) for member in range(members)]
    writer.finish(Manifest(_base_of(adapter), None, writer.entries(names), {"task": ["tiny"], "seed": 0}))
    return folder


def _base_of(adapter: Path) -> str:
    from lm_eval_lora_ensemble.ensemble.adapters.config import read_config

    return str(read_config(adapter / CONFIG).base_model)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def files(folder: Path) -> dict[str, bytes]:
    """Everything that a folder holds, but for the manifest's folders and versions."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".drawing" not in path.parts
    }


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[name].flatten().to(torch.float64) for name in sorted(state)])
