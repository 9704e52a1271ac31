"""What a method draws from: one adapter, an ensemble's members, or the snapshots that a training run kept.

Whoever made them, adapters are data: all that is handed on here has passed the same gate as what is loaded for scoring
(:mod:`lm_eval_lora_ensemble.ensemble.adapters`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lm_eval_lora_ensemble.ensemble import members
from lm_eval_lora_ensemble.ensemble.adapters.config import AdapterConfig
from lm_eval_lora_ensemble.ensemble.adapters.folder import CONFIG, WEIGHTS, check_adapter
from lm_eval_lora_ensemble.ensemble.listing import refuse_unfinished
from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME, Manifest
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.contract import Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.registry import Method

# what may differ between two snapshots of one run: who saved them and when, not what they compute
_OF_THE_FILE = {"base_model_name_or_path", "inference_mode", "peft_version", "revision"}


class TensorsOnDisk(Mapping[str, torch.Tensor]):
    """The tensors of one weights file, each read when it is asked for: a run's snapshots need not fit into memory.

    Args:
        path: adapter_model.safetensors, which has been checked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(str(path), framework="pt", device="cpu") as file:
            self._names = tuple(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor, in the type it is stored in."""
        if name not in self._names:
            raise KeyError(name)
        with safe_open(str(self.path), framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor.clone()  # of no file that could change or vanish under it

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)


@dataclass(frozen=True)
class Found:
    """Where the members of a source are; nothing of them has been read.

    Attributes:
        places: of the members, or of the one that was asked for.
        listed: the ensemble's manifest, where there is one.
    """

    places: tuple[members.Source, ...]
    listed: Manifest | None


def find_source(adapters: str, member: int | None = None, *, everything: bool = False) -> Found:
    """Find where the members of a source are.

    Args:
        adapters: an ensemble folder, a folder of adapters, one adapter folder, or a Hub id of either.
        member: only this one, from 0.
        everything: of an ensemble on the Hub, download kept adapters and optimisers' state too.

    Raises:
        EnsembleError: there is nothing, a training run that is not finished, a whole model, or no such member.
    """
    folder = Path(adapters).expanduser()
    if folder.is_dir():
        refuse_unfinished(folder)
        adapters_here = any((folder / name).is_file() for name in (CONFIG, FILE_NAME))
        if (folder / "config.json").is_file() and not adapters_here:
            raise EnsembleError(
                f"{folder} is a whole model; an adapter that was merged into its base has no A and B left to draw: "
                "name the adapter's own folder"
            )
    places, listed = members.find_sources(adapters, everything=everything)
    if member is None:
        return Found(tuple(places), listed)
    if member >= len(places):
        raise EnsembleError(
            f"member={member}: {adapters} has {len(places)} members; give a number from 0 to {len(places) - 1}"
        )
    return Found((places[member],), listed)


def read_sources(
    found: Found, method: Method, *, kept: str | None = None, pretrained: str | None = None
) -> list[Source]:
    """Check every adapter that will be drawn from, and return what the method needs of each member.

    Args:
        found: where they are.
        method: what they are for.
        kept: ``epochs`` or ``steps``, for methods of snapshots; None takes steps where there are any.
        pretrained: the base model, where the adapters name none.

    Raises:
        EnsembleError: something is no sound adapter, there are no snapshots, they are not of one shape, or the members
            are not of one base model.
    """
    configs: list[AdapterConfig] = []
    groups = []
    for place in found.places:
        folders = {place.name: place.folder}
        if method.needs == "snapshots":
            folders = _snapshots(place, method.name, kept)
        adapters = []
        for name, folder in folders.items():
            checked = check_adapter(folder, place.root)
            state = TensorsOnDisk(folder / WEIGHTS)
            adapters.append(SourceAdapter(name, folder, checked.sha256, checked.config.values, state))
            configs.append(checked.config)
        _refuse_different_shapes(adapters)
        groups.append(tuple(adapters))
    base, revision = members.common_base(configs, found.listed, pretrained)
    return [Source(base, revision, adapters) for adapters in groups]


def _snapshots(place: members.Source, method: str, kept: str | None) -> dict[str, Path]:
    """Return the kept adapters of one run, in the order of training, by name."""
    unit = kept or ("steps" if place.steps else "epochs")
    found = sorted((place.steps if unit == "steps" else place.epochs).items())
    if not found:
        raise EnsembleError(
            f"{place.folder} has no kept {unit if kept else 'epochs or steps'}, which {method} needs; train with the "
            "recipe key keep_snapshots, or draw by a method that takes one adapter (`dropout`)"
        )
    return {f"{place.name}/{folder.name}": folder for _, folder in found}


def _refuse_different_shapes(adapters: Sequence[SourceAdapter]) -> None:
    first = adapters[0]
    expected = _form(first)
    for other in adapters[1:]:
        differing = _difference(expected, _form(other))
        if differing:
            raise EnsembleError(
                f"{first.name} and {other.name} differ in {differing}, so they are not snapshots of one run; name a "
                "run whose kept adapters are alike"
            )


def _form(adapter: SourceAdapter) -> dict[str, Any]:
    """Return what snapshots of one run have in common: settings, and the tensors' shapes and types."""
    with safe_open(str(adapter.folder / WEIGHTS), framework="pt", device="cpu") as file:
        tensors = {
            name: (tuple(part.get_shape()), part.get_dtype())
            for name in file.keys()  # noqa: SIM118 - not a mapping
            for part in [file.get_slice(name)]
        }
    settings = {key: value for key, value in adapter.config.items() if key not in _OF_THE_FILE}
    return {**settings, **tensors}


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Return the first key on which two mappings differ; lists of names are sets to PEFT, saved in any order."""
    for key in sorted({*one, *other}):
        if _ordered(one.get(key)) != _ordered(other.get(key)):
            return key
    return None


def _ordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value
