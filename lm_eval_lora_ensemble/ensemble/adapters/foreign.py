"""What lies in an adapter's folder under PEFT's file names and is something else, recognised and named."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.errors import EnsembleError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse a file that is Git LFS's note of where the real one is, as a clone without LFS leaves it.

    Raises:
        EnsembleError: it is one.
    """
    begins = b""
    with contextlib.suppress(OSError):  # whoever reads the file itself says what is wrong with it
        if path.is_file():
            with path.open("rb") as stream:
                begins = stream.read(len(_LFS_POINTER))
    if begins == _LFS_POINTER:
        raise EnsembleError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}, or download "
            "the file again"
        )


def refuse_other_formats(path: Path, values: dict[str, Any]) -> None:
    """Refuse the adapter_config.json of another library than PEFT, by that library's name.

    Args:
        path: the file.
        values: what it holds.

    Raises:
        EnsembleError: it is MLX-LM's or AdapterHub's.
    """
    if "peft_type" in values:
        return
    if "fine_tune_type" in values or "lora_parameters" in values:
        raise EnsembleError(
            f"{path} is MLX-LM's, another format than PEFT's; put the adapter into its model with `mlx_lm.fuse` and "
            "evaluate that with --model hf, or train the adapter with PEFT"
        )
    if isinstance(values.get("config"), dict) and {"model_class", "model_name", "model_type"} & set(values):
        raise EnsembleError(
            f"{path} is AdapterHub's (the library `adapters`), another format than PEFT's; train the adapter with PEFT"
        )
