"""What a posterior over adapters is, and what a method needs to fit one.

A method turns a source into a :class:`Posterior`; a posterior draws adapters. What it draws is data, an adapter's
tensors under PEFT's own names, so that every method's members are written, checked, scored and compared alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

AdapterState = dict[str, torch.Tensor]
"""An adapter's tensors by their names in adapter_model.safetensors, on the CPU."""


@dataclass(frozen=True)
class SourceAdapter:
    """One trained adapter that a method starts from.

    Attributes:
        name: for messages and the manifest, such as ``member_00`` or ``member_00/step_00000040``.
        folder: where its files are.
        sha256: of its configuration and weights together.
        config: adapter_config.json.
        state: its tensors, in the types they are stored in.
    """

    name: str
    folder: Path
    sha256: str
    config: Mapping[str, Any]
    state: AdapterState


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


class Posterior(ABC):
    """A distribution over the weights of one adapter.

    Attributes:
        config: adapter_config.json of every draw; the source's, unless the draws have another shape.
        settings: what was fitted or chosen (σ, prior precision, which documents), as JSON; goes into the manifest.
    """

    config: Mapping[str, Any]
    settings: Mapping[str, Any]

    @abstractmethod
    def draw(self, generator: torch.Generator) -> AdapterState:
        """Draw one adapter; all its randomness comes from ``generator``, a CPU generator of its own.

        The tensors have the names, shapes and types that ``config`` promises and share no memory with the source.
        """
