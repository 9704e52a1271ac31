"""Checkpoints that a kill at any instant cannot spoil.

    .training/member_00/step_00000120/state.safetensors   parameters and the optimiser's moments
                                      progress.json       epoch records, running loss, early stopping
                                      manifest.json       sha256 of both

Guaranteed: a checkpoint's folder appears under its name only when all of it is on the disk (written beside,
flushed, renamed). A newest one that is damaged all the same (a lost disk cache, a stray hand) is named in the
log and the one before is used. Older ones go only when the newer ones of all members are in place.
Traded away: disk space for ``keep_checkpoints`` copies. Out of scope: a disk that loses what it confirmed.

A checkpoint belongs to one member, so members can be regrouped over processes between a stop and a restart.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lm_eval_lora_ensemble.disk import checksums, write_folder
from lm_eval_lora_ensemble.errors import EnsembleError

log = logging.getLogger(__name__)

_STATE, _PROGRESS, _MANIFEST = "state.safetensors", "progress.json", "manifest.json"


class Checkpoints:
    """The checkpoints of all members of an ensemble.

    Args:
        folder: where they are kept.
        keep: how many of each member.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, states: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]) -> None:
        """Write the checkpoints of several members after ``step`` steps, then remove those too old.

        Args:
            step: optimiser steps taken.
            states: tensors and progress of each member by name.
        """
        for name, (tensors, progress) in states.items():

            def fill(path: Path, tensors: Any = tensors, progress: Any = progress) -> None:
                _fill(path, tensors, progress)

            write_folder(self._path(name, step), self.folder, fill)
        for name in states:
            for old in self._steps(name)[: -self.keep]:
                shutil.rmtree(self._path(name, old))

    def newest(self, names: Sequence[str]) -> int | None:
        """Return the latest step of which every named member has an undamaged checkpoint."""
        common = set.intersection(*(set(self._steps(name)) for name in names))
        for step in sorted(common, reverse=True):
            damaged = [self._path(name, step) for name in names if not _intact(self._path(name, step))]
            if not damaged:
                return step
            log.warning("Checkpoint %s is damaged; going back to the one before", damaged[0])
        return None

    def refuse_apart(self, names: Sequence[str]) -> None:
        """Refuse members that have come to different steps: together they would begin anew.

        Raises:
            EnsembleError: there are checkpoints, but no step has one of every member.
        """
        steps = {name: self._steps(name) for name in names}
        if any(steps.values()) and not set.intersection(*map(set, steps.values())):
            at = ", ".join(f"{name} at step {of[-1] if of else 0}" for name, of in steps.items())
            raise EnsembleError(
                f"{self.folder.parent}: these members were trained apart ({at}); go on with each alone, --member I"
            )

    def load(self, name: str, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return a member's tensors and progress."""
        from safetensors.torch import load_file

        path = self._path(name, step)
        return load_file(path / _STATE), json.loads((path / _PROGRESS).read_text(encoding="utf-8"))

    def _path(self, name: str, step: int) -> Path:
        return self.folder / name / f"step_{step:08d}"

    def _steps(self, name: str) -> list[int]:
        """Return the steps of a member's checkpoints, damaged or not, in order."""
        return sorted(int(path.name.removeprefix("step_")) for path in (self.folder / name).glob("step_*"))


def _fill(path: Path, tensors: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    # AdamW's step counts may share memory with each other; safetensors wants every tensor on its own.
    save_file({key: value.cpu().clone() for key, value in tensors.items()}, str(path / _STATE))
    (path / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
    (path / _MANIFEST).write_text(json.dumps(checksums(path, path)), encoding="utf-8")


def _intact(path: Path) -> bool:
    """Whether a checkpoint's files are those its manifest lists."""
    try:
        expected = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    actual = checksums(path, path)
    actual.pop(_MANIFEST)
    return bool(expected) and actual == expected
