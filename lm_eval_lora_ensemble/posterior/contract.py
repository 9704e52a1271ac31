"""What a posterior over adapters is, and what a method needs to fit one.

A method turns a source into a :class:`Posterior`; a posterior draws adapters. What it draws is data, an adapter's
tensors under PEFT's own names, so that every method's members are written, checked, scored and compared alike.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

AdapterState = dict[str, torch.Tensor]
"""An adapter's tensors by their names in adapter_model.safetensors, on the CPU."""
StoredState = Mapping[str, torch.Tensor]
"""The same, of an adapter that lies on the disk: a tensor may be read anew each time that it is asked for."""


@dataclass(frozen=True)
class SourceAdapter:
    """One trained adapter that a method starts from.

    Attributes:
        name: for messages and the manifest, such as ``member_00`` or ``member_00/step_00000040``.
        folder: where its files are.
        sha256: of its configuration and weights together.
        config: adapter_config.json.
        state: its tensors, in the types they are stored in; not to be changed.
    """

    name: str
    folder: Path
    sha256: str
    config: Mapping[str, Any]
    state: StoredState


@dataclass(frozen=True)
class Source:
    """What a posterior is fitted to.

    Attributes:
        base_model: Hub id or folder.
        revision: of the base model, where known.
        adapters: one adapter; or the kept snapshots of one training run, in their order.
    """

    base_model: str
    revision: str | None
    adapters: tuple[SourceAdapter, ...]

    @property
    def name(self) -> str:
        """The adapter's name, or that of the member whose snapshots these are."""
        return self.adapters[0].name if len(self.adapters) == 1 else self.adapters[0].name.partition("/")[0]

    @property
    def folder(self) -> Path:
        """The adapter's folder, or the one that holds the snapshots."""
        folder = self.adapters[0].folder
        return folder if len(self.adapters) == 1 else folder.parent

    @property
    def sha256(self) -> str:
        """The adapter's, or one over all snapshots' in their order."""
        if len(self.adapters) == 1:
            return self.adapters[0].sha256
        return hashlib.sha256("".join(adapter.sha256 for adapter in self.adapters).encode()).hexdigest()


class Posterior(ABC):
    """A distribution over the weights of one adapter.

    Attributes:
        config: adapter_config.json of every draw; the source's, unless the draws have another shape.
        settings: what was fitted or chosen (σ, prior precision, which documents), as JSON, the most telling first. It
            goes into the manifest; numbers and words of it name the method's row in a report.
    """

    config: Mapping[str, Any]
    settings: Mapping[str, Any]

    @abstractmethod
    def draw(self, generator: torch.Generator) -> AdapterState:
        """Draw one adapter; all its randomness comes from ``generator``, a CPU generator of its own.

        The tensors have the names, shapes and types that ``config`` promises and share no memory with the source.
        """


class ListedPosterior(Posterior):
    """A posterior that is so many adapters of equal weight: its draws are numbered, each of them once."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def take(self, number: int) -> AdapterState:
        """Return adapter ``number``, from 0; the first is the one to have if only one is wanted."""

    def origin(self, number: int) -> SourceAdapter | None:  # noqa: ARG002 - for those that know
        """Return the one adapter of the source that ``number`` is, where it is one."""
        return None

    def draw(self, generator: torch.Generator) -> AdapterState:
        """Draw one of them at random."""
        return self.take(int(torch.randint(len(self), (), generator=generator)))
