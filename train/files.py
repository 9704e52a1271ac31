"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lm_eval_lora_ensemble.errors import EnsembleError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one line; what was there before stays intact."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnsembleError(
            f"cannot write in {path}: {reason}; make room there and run the same command again (it goes on "
            "from the last checkpoint), or give another output="
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place, flush it and rename it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text, encoding="utf-8")
    flush(scratch)
    scratch.replace(path)


def copy_file(source: Path, target: Path, scratch_parent: Path) -> None:
    """Copy a file beside its place, flush it and rename it."""
    scratch = scratch_parent / f"{target.parent.name}.{target.name}.{os.getpid()}"
    shutil.copyfile(source, scratch)
    flush(scratch)
    scratch.replace(target)


def write_folder(target: Path, scratch_parent: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a folder beside its place, flush every file and rename the folder to ``target``.

    An older ``target`` is moved away first. Between the two renames there is none: a reader sees the old one,
    nothing, or the new one, never a mixture.
    """
    scratch = scratch_parent / f"{target.parent.name}.{target.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    fill(scratch)
    for file in scratch.iterdir():
        flush(file)
    flush(scratch)
    target.parent.mkdir(parents=True, exist_ok=True)
    old = scratch.with_name(scratch.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Bring a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
