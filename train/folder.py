"""The ensemble's folder on disk: what is in it, and who may write it.

    recipe.yaml                   the resolved recipe; a run with another one is refused
    metrics.jsonl                 one line an epoch: every member and the ensemble
    ensemble.json                 the manifest, written last
    member_00/                    the final adapter
        member.json               the member's entry of the manifest, written when the member is done
        epochs.jsonl              one line an epoch: the member alone
        epoch_01/ …               the adapter after each epoch
        step_00000040/ …          the adapter after steps that keep_snapshots names
        validation/epoch_00.npy … loglikelihoods [D, C] of the validation documents
        validation/documents.json which documents those are: their golds, and their choices' lengths
    .training/                    checkpoints, scratch space and locks; removed when all is done
        schema_version            how this release computes a step; written before recipe.yaml

A process writes only the folders of its own members. What concerns the ensemble is put together from the
members' files by whichever process finds them complete, so processes need not talk to each other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.disk import copy_file, refuse_file, write_text, writing
from lm_eval_lora_ensemble.ensemble.calibration import Calibration
from lm_eval_lora_ensemble.ensemble.manifest import Manifest, MemberEntry
from lm_eval_lora_ensemble.ensemble.writer import EnsembleWriter, member_name
from lm_eval_lora_ensemble.errors import EnsembleError, Interrupted
from lm_eval_lora_ensemble.harness.provenance import versions
from lm_eval_lora_ensemble.train import recipe as recipes
from lm_eval_lora_ensemble.train.recipe import Recipe

EPOCHS = "epochs.jsonl"
METRICS = "metrics.jsonl"
SCRATCH = ".training"
STEP_VERSION = 2
"""How a step is computed, down to the shapes of its rows. A run is finished under the number it was begun with, or
its remaining steps would not be the same training. Release 0.1.0 wrote none."""


class EnsembleFolder(EnsembleWriter):
    """The output folder of one recipe.

    Args:
        recipe: the run's recipe; ``recipe.output`` is the folder.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(Path(recipe.output).expanduser().absolute(), SCRATCH, "training")
        self.recipe = recipe
        self.names = [member_name(i) for i in range(recipe.members)]

    @property
    def unfinished(self) -> list[str]:
        """The members that are not done yet."""
        return [name for name in self.names if not self.finished(name)]

    def check_recipe(self) -> None:
        """Refuse a folder that another recipe wrote, that another release began, or that something else fills."""
        refuse_file(self.path, f"output={self.path}")
        self._check_release()
        path = self.path / recipes.FILE_NAME
        if not path.is_file():
            others = [p.name for p in self.path.iterdir() if p.name != SCRATCH] if self.path.is_dir() else []
            if others:
                raise EnsembleError(
                    f"{self.path} holds {sorted(others)[0]} but no {recipes.FILE_NAME}, so no training run "
                    "made it; give another output="
                )
            return
        changed = Recipe.load(path).differences(self.recipe)
        if changed:
            raise EnsembleError(
                f"{self.path} was begun with another recipe: {', '.join(changed)} changed; "
                "give the same values to go on, or another output= to begin anew"
            )

    def _check_release(self) -> None:
        """Refuse to go on with a run whose first steps another release computed in another way."""
        begun = any(self.scratch.glob("member_*/step_*")) or any(map(self.finished, self.names))
        version = self._step_version()
        # asked last: another process may have finished all meanwhile, and removed .training with its version
        if not begun or version == str(STEP_VERSION) or self.complete or not self.unfinished:
            return
        release = "release 0.1.0" if version is None else "another release"
        raise EnsembleError(
            f"{self.path} was begun by {release}, which computes a step in another way, so this release cannot "
            f"finish it; finish it with {release}, or give another output= to begin anew"
        )

    def _step_version(self) -> str | None:
        try:
            return (self.scratch / "schema_version").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    @contextmanager
    def claim(self, names: Sequence[str]) -> Iterator[None]:
        """Keep other processes off these members until the context ends.

        The operating system releases the locks of a process that dies. If an error ends a run that was the
        folder's first and left neither an epoch nor a checkpoint, what it wrote is removed.
        """
        created = not self.path.exists()
        with ExitStack() as locks:
            with writing(self.path):
                self.scratch.mkdir(parents=True, exist_ok=True)
                for name in names:
                    locks.enter_context(self.lock(name))
                    self.sweep(name)
                self.check_recipe()
                if self._step_version() is None:
                    write_text(self.scratch / "schema_version", f"{STEP_VERSION}\n")
            first = names == self.names and not (self.path / recipes.FILE_NAME).is_file()
            try:
                yield
            except EnsembleError:
                kept = [*self.path.glob("member_*/epoch_*"), *self.scratch.glob("member_*/step_*")]
                if first and not kept:
                    self._discard(everything=created)
                raise
            except KeyboardInterrupt:
                raise Interrupted(
                    f"finished epochs and the last checkpoint are kept in {self.path}; the same command goes on "
                    "from there"
                ) from None

    def begin(self) -> None:
        """Write the recipe, which from now on guards the folder."""
        with writing(self.path):
            if not (self.path / recipes.FILE_NAME).is_file():
                write_text(self.path / recipes.FILE_NAME, self.recipe.as_yaml())

    def _discard(self, *, everything: bool) -> None:
        """Remove what a run without a finished epoch wrote, or the whole folder if the run created it."""
        if everything:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for folder in (self.scratch, *(self.path / name for name in self.names)):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (recipes.FILE_NAME, METRICS):
            (self.path / file).unlink(missing_ok=True)

    def write_epoch(self, name: str, epoch: int, fill: Callable[[Path], None]) -> None:
        """Write ``member_XX/epoch_YY``; ``fill`` puts the adapter's files into the folder it is given."""
        self.write_adapter(f"{name}/{epoch_name(epoch)}", fill)

    def write_snapshot(self, name: str, step: int, fill: Callable[[Path], None]) -> None:
        """Write ``member_XX/step_ZZZZZZZZ``, as :meth:`write_epoch` writes an epoch."""
        self.write_adapter(f"{name}/{step_name(step)}", fill)

    def write_records(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """Write a member's epochs.jsonl."""
        with writing(self.path):
            (self.path / name).mkdir(parents=True, exist_ok=True)
            write_text(self.path / name / EPOCHS, _lines(records))

    def read_records(self, name: str) -> list[dict[str, Any]]:
        """Return a member's epochs.jsonl, empty if there is none yet."""
        path = self.path / name / EPOCHS
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []

    def write_metrics(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write metrics.jsonl."""
        with writing(self.path):
            write_text(self.path / METRICS, _lines(lines))

    def validation_file(self, name: str, epoch: int) -> Path:
        """Return where a member's validation loglikelihoods of an epoch are."""
        return self.path / name / "validation" / f"{epoch_name(epoch)}.npy"

    def documents_file(self, name: str) -> Path:
        """Return where it stands which documents a member's validation loglikelihoods are of."""
        return self.path / name / "validation" / "documents.json"

    def write_documents(self, name: str, documents: dict[str, Any]) -> None:
        """Write a member's validation/documents.json."""
        path = self.documents_file(name)
        with writing(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(documents) + "\n")

    def finish_member(self, name: str, seed: int, epochs: int, final_epoch: int) -> None:
        """Make epoch ``final_epoch`` the member's final adapter and write its entry of the manifest."""
        folder = self.path / name
        with writing(self.path):
            for source in sorted((folder / epoch_name(final_epoch)).iterdir()):
                copy_file(source, folder / source.name, self.scratch)
        kept = {epoch: f"{name}/{epoch_name(epoch)}" for epoch in range(1, epochs + 1)}
        steps = {
            int(path.name.removeprefix("step_")): f"{name}/{path.name}"
            for path in sorted(folder.glob("step_*"))
        }
        self.write_entry(MemberEntry(name=name, folder=name, seed=seed, epochs=kept, steps=steps))

    def finish_run(self, base_model: str, calibration: Calibration | None) -> None:
        """Write the manifest of members that are all done, and remove what only training needed."""
        self.finish(
            Manifest(
                base_model=base_model,
                revision=self.recipe.revision,
                members=self.entries(self.names),
                recipe=self.recipe.as_mapping(operational=False),
                versions=versions(),
                calibration=calibration,
            )
        )


def begun(folder: Path) -> bool:
    """Whether a training run has written in this folder."""
    return (folder / SCRATCH).is_dir() or any(folder.glob(f"member_*/{EPOCHS}"))


def epoch_name(epoch: int) -> str:
    """Return the name of an epoch's folder."""
    return f"epoch_{epoch:02d}"


def step_name(step: int) -> str:
    """Return the name of the folder of the adapter after so many optimiser steps."""
    return f"step_{step:08d}"


def _lines(values: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)
