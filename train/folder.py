"""The ensemble's folder on disk: who may write it, and how nothing in it is ever half-written.

    recipe.yaml                   the resolved recipe; a run with another one is refused
    metrics.jsonl                 one line an epoch: every member and the ensemble
    ensemble.json                 the manifest, written last
    member_00/                    the final adapter
        member.json               the member's entry of the manifest, written when the member is done
        epoch_01/ …               the adapter after each epoch
        validation/epoch_00.npy … loglikelihoods [D, C] of the validation documents
    .training/                    checkpoints and locks; removed when all is done

Folders are written beside their place, flushed to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from lm_eval_lora_ensemble.train import recipe as recipes
from lm_eval_lora_ensemble.train.card import library_versions
from lm_eval_lora_ensemble.train.recipe import Recipe

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.manifest import FILE_NAME as MANIFEST
from lm_eval_lora_ensemble.manifest import Manifest, MemberEntry, checksums, write_json

MEMBER = "member.json"
METRICS = "metrics.jsonl"
SCRATCH = ".training"


class EnsembleFolder:
    """The output folder of one recipe.

    Args:
        recipe: the run's recipe; ``recipe.output`` is the folder.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.path = Path(recipe.output).expanduser().absolute()
        self.scratch = self.path / SCRATCH

    @property
    def complete(self) -> bool:
        """Whether the manifest has been written."""
        return (self.path / MANIFEST).is_file()

    def check_recipe(self) -> None:
        """Refuse a folder that another recipe wrote, or that something else fills."""
        path = self.path / recipes.FILE_NAME
        if not path.is_file():
            others = [p.name for p in self.path.iterdir() if p.name != SCRATCH] if self.path.is_dir() else []
            if others:
                raise EnsembleError(
                    f"{self.path} holds {sorted(others)[0]} but no {recipes.FILE_NAME}, so no run of this command "
                    "made it; give another output="
                )
            return
        changed = Recipe.load(path).differences(self.recipe)
        if changed:
            raise EnsembleError(
                f"{self.path} was begun with another recipe: {', '.join(changed)} changed; "
                "give the same values to go on, or another output= to begin anew"
            )

    def claim(self) -> None:
        """Create the folder and its recipe."""
        with writing(self.path):
            self.scratch.mkdir(parents=True, exist_ok=True)
            if not (self.path / recipes.FILE_NAME).is_file():
                write_text(self.path / recipes.FILE_NAME, self.recipe.as_yaml())

    def member(self, name: str) -> Path:
        """Return a member's folder."""
        return self.path / name

    def finished(self, name: str) -> bool:
        """Whether the member is done."""
        return (self.member(name) / MEMBER).is_file()

    def write_epoch(self, name: str, epoch: int, fill: Callable[[Path], None]) -> None:
        """Write ``member_XX/epoch_YY``; ``fill`` puts the adapter's files into the folder it is given."""
        with writing(self.path):
            write_folder(self.member(name) / epoch_name(epoch), self.scratch, fill)

    def finish_member(self, name: str, seed: int, epochs: int, final_epoch: int) -> None:
        """Make epoch ``final_epoch`` the member's final adapter and write its entry of the manifest."""
        folder = self.member(name)
        with writing(self.path):
            for source in sorted((folder / epoch_name(final_epoch)).iterdir()):
                scratch = self.scratch / f"{name}.{source.name}"
                shutil.copyfile(source, scratch)
                _flush(scratch)
                scratch.replace(folder / source.name)
            kept = {epoch: folder / epoch_name(epoch) for epoch in range(1, epochs + 1)}
            files = checksums(folder, self.path)
            for path in kept.values():
                files |= checksums(path, self.path)
            entry = MemberEntry(
                name=name,
                folder=name,
                seed=seed,
                epochs={epoch: path.relative_to(self.path).as_posix() for epoch, path in kept.items()},
                files=files,
            )
            write_json(folder / MEMBER, asdict(entry))

    def finish(self, base_model: str) -> bool:
        """Write the manifest if every member is done; return whether it is written."""
        names = [f"member_{i:02d}" for i in range(self.recipe.members)]
        if not all(self.finished(name) for name in names):
            return False
        entries = []
        for name in names:
            raw = json.loads((self.member(name) / MEMBER).read_text(encoding="utf-8"))
            entries.append(MemberEntry(**{**raw, "epochs": {int(k): v for k, v in raw["epochs"].items()}}))
        with writing(self.path):
            Manifest(
                base_model=base_model,
                revision=self.recipe.revision,
                members=entries,
                recipe=self.recipe.as_mapping(),
                versions=library_versions(),
            ).write(self.path)
            shutil.rmtree(self.scratch, ignore_errors=True)
        return True


def epoch_name(epoch: int) -> str:
    """Return the name of an epoch's folder."""
    return f"epoch_{epoch:02d}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one line; what was there before stays intact."""
    try:
        yield
    except OSError as error:
        raise EnsembleError(
            f"cannot write in {path}: {error.strerror or error}; make room there and run the same command again, "
            "it goes on from the last checkpoint; or give another output="
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place, flush it and rename it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text, encoding="utf-8")
    _flush(scratch)
    scratch.replace(path)


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
        _flush(file)
    _flush(scratch)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = scratch.with_name(scratch.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        scratch.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Bring a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
