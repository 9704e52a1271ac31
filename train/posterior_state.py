"""What a variational optimiser learnt about the weights beside their mean: a file beside the adapter that is the mean.

    member_00/posterior.safetensors   tensors under the adapter's own names; method and settings in its header

It is written with the adapter, in the same step of the file system, and is in the manifest's checksums.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lm_eval_lora_ensemble.disk import sha256
from lm_eval_lora_ensemble.ensemble.adapters.folder import POSTERIOR, link_root, regular_file
from lm_eval_lora_ensemble.errors import EnsembleError

FILE_NAME = POSTERIOR
_HEADER = "posterior"


@dataclass(frozen=True)
class PosteriorState:
    """A posterior's spread, where its mean is an adapter.

    Attributes:
        method: ``ivon`` or ``blob``.
        settings: what else its draws depend on, as JSON.
        tensors: float32, by the names of the adapter's tensors that they are about, in their shapes: IVON's Hessian
            of A and B, or BLoB's G of A.
    """

    method: str
    settings: Mapping[str, float]
    tensors: Mapping[str, torch.Tensor]

    def write(self, folder: Path) -> None:
        """Write ``folder/posterior.safetensors``, with equal bytes for an equal state."""
        from safetensors.torch import save_file

        # one entry: safetensors writes several in an order that differs from one process to the next
        header = {
            _HEADER: json.dumps({"method": self.method, "settings": dict(self.settings)}, sort_keys=True)
        }
        tensors = {
            name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in self.tensors.items()
        }
        save_file(tensors, str(folder / FILE_NAME), metadata=header)

    @classmethod
    def read(cls, folder: Path, method: str, adapter: Mapping[str, torch.Tensor]) -> PosteriorState:
        """Read the state beside an adapter and check it against the adapter.

        Args:
            folder: the adapter's.
            method: that its draws are wanted of.
            adapter: its tensors.

        Raises:
            EnsembleError: there is none, it is another method's, or it does not fit the adapter.
        """
        from safetensors import SafetensorError, safe_open

        path = folder / FILE_NAME
        if not regular_file(folder, FILE_NAME, link_root(folder)):
            raise EnsembleError(
                f"{folder} has no {FILE_NAME}, which training with {_KEYS[method]} leaves beside an adapter; train so, "
                "or draw by a method that takes any adapter"
            )
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                found, settings = str(header["method"]), _numbers(header["settings"])
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                _refuse_misfit(path, shapes, adapter)
                tensors = {name: file.get_tensor(name) for name in shapes}
        except EnsembleError:
            raise
        except (
            OSError,
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise EnsembleError(
                f"{path} is not readable ({type(error).__name__}: {error}); copy the folder again or train it again"
            ) from error
        if found != method:
            raise EnsembleError(f"{path} is of {found!r}, not of {method}; draw with {found!r}")
        for name, tensor in tensors.items():
            if not (tensor.is_floating_point() and bool(torch.isfinite(tensor).all())):
                raise EnsembleError(f"{path}: {name} has values that are not finite numbers; train it again")
        return cls(method, settings, tensors)


_KEYS = {"ivon": "optimizer: ivon", "blob": "posterior: blob"}


def _numbers(settings: Any) -> dict[str, float]:
    return {str(name): float(value) for name, value in settings.items()}


def _refuse_misfit(path: Path, shapes: Mapping[str, list[int]], adapter: Mapping[str, torch.Tensor]) -> None:
    for name, shape in shapes.items():
        if name not in adapter or list(adapter[name].shape) != list(shape):
            raise EnsembleError(f"{path} is of another adapter: {name!r} does not fit; copy the folder again")


def identity(folder: Path) -> dict[str, str]:
    """Return which state the draws of an adapter depend on, for their manifest."""
    return {"file": FILE_NAME, "sha256": sha256(folder / FILE_NAME)}
