"""One adapter folder: which files of it are read at all, and that no link leads out of it.

Read are adapter_config.json and adapter_model.safetensors, nothing else. A pickle beside them is never opened;
a folder that has only a pickle is refused, with the way to convert it (:mod:`..convert`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lm_eval_lora_ensemble.disk import sha256
from lm_eval_lora_ensemble.ensemble.adapters.config import AdapterConfig, read_config
from lm_eval_lora_ensemble.ensemble.adapters.weights import Weights, read_weights
from lm_eval_lora_ensemble.errors import EnsembleError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
POSTERIOR = "posterior.safetensors"
"""What variational training leaves beside an adapter, for draws of it."""
PICKLE = "adapter_model.bin"


@dataclass(frozen=True)
class Adapter:
    """A checked adapter.

    Attributes:
        folder: where it is.
        config: its configuration.
        weights: its tensors' names and shapes.
        sha256: of configuration and weights together.
    """

    folder: Path
    config: AdapterConfig
    weights: Weights
    sha256: str


def link_root(folder: Path) -> Path:
    """Return the folder that no link under ``folder`` may leave.

    It is ``folder`` itself; inside the Hugging Face Hub's cache, whose snapshots are links into the same
    repository's blobs, it is the repository's own cache folder.
    """
    for inner in (folder, *folder.parents):
        if inner.parent.name == "snapshots" and inner.parent.parent.name.startswith("models--"):
            return inner.parent.parent
    return folder


def inside(path: Path, root: Path) -> Path:
    """Return ``path`` with its links followed.

    Raises:
        EnsembleError: that leads out of ``root``, or in a circle.
    """
    try:
        resolved = path.resolve()
        resolved.exists()  # raises what resolving lets pass: a name that is too long, a folder that is closed
    except (OSError, RuntimeError, ValueError) as error:  # Python before 3.13 says RuntimeError of a circle
        raise EnsembleError(f"{path} cannot be followed ({error}); copy the files themselves") from error
    if not resolved.is_relative_to(root):
        raise EnsembleError(
            f"{path} leads to {resolved}, which lies outside {root}; copy the files themselves"
        )
    return resolved


def check_config(folder: Path, root: Path) -> AdapterConfig:
    """Check an adapter's configuration, and that its weights are there as safetensors.

    What is wrong with the configuration is said first: it tells formats of other libraries by their names.

    Args:
        folder: the adapter.
        root: what its links may not leave; see :func:`link_root`.

    Raises:
        EnsembleError: it is no LoRA adapter, or one that is not data alone.
    """
    config = find_config(folder, root)
    if not regular_file(folder, WEIGHTS, root):
        raise EnsembleError(_without_weights(folder, root))
    return config


def find_config(folder: Path, root: Path) -> AdapterConfig:
    """Find and check an adapter's configuration, whatever its weights are.

    Args:
        folder: the adapter.
        root: what its links may not leave; see :func:`link_root`.

    Raises:
        EnsembleError: it is no LoRA adapter's, or not data alone.
    """
    if not regular_file(folder, CONFIG, root):
        raise EnsembleError(
            f"{folder} is not a PEFT adapter: it has no {CONFIG}; name the adapter's own folder"
        )
    return read_config(folder / CONFIG)


def regular_file(folder: Path, name: str, root: Path) -> bool:
    """Whether ``folder`` has something called ``name``, which must then be a file inside ``root``.

    Raises:
        EnsembleError: it leads out of ``root``, or is a folder, a pipe or a device.
    """
    path = inside(folder / name, root)
    if path.exists() and not path.is_file():
        raise EnsembleError(f"{folder} holds something at {name} that is not a file; export it again")
    return path.exists()


def _without_weights(folder: Path, root: Path) -> str:
    """Say what to do about a folder that has no weights in safetensors."""
    if (folder / PICKLE).exists():
        return (
            f"{folder} has its weights in {PICKLE} only, a pickle, which is not loaded; "
            f"`lora-ensemble convert {folder}` writes {WEIGHTS} beside it"
        )
    if root != folder and root.name.startswith("models--"):
        name = root.name.removeprefix("models--").replace("--", "/")
        return (
            f"{name} has no {WEIGHTS} on the Hugging Face Hub; if it has {PICKLE}, download it with "
            f"`hf download {name} --local-dir FOLDER`, and run `lora-ensemble convert FOLDER`"
        )
    return f"{folder} has no {WEIGHTS}; copy or export the adapter again"


def check_adapter(folder: Path, root: Path) -> Adapter:
    """Check one adapter folder in full: configuration, names, shapes and every value.

    Raises:
        EnsembleError: anything about it is not what PEFT would have saved.
    """
    config = check_config(folder, root)
    weights = read_weights(folder / WEIGHTS, config)
    return Adapter(
        folder, config, weights, adapter_sha256(*(sha256(folder / name) for name in (CONFIG, WEIGHTS)))
    )


def adapter_sha256(config: str, weights: str) -> str:
    """Return an adapter's checksum from those of its configuration and its weights."""
    return hashlib.sha256(f"{config}{weights}".encode()).hexdigest()
