"""Write an ensemble's folder, whoever makes the members: each whole or not at all, the manifest last.

    ensemble.json        the manifest, written last: the folder is an ensemble from then on
    member_00/           a member's adapter, plain PEFT
        member.json      its entry of the manifest, with the checksum of every file
    .SCRATCH/            scratch space and locks; removed when all is done

Training and drawing write their members through this class; what else lies in the folder is theirs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from lm_eval_lora_ensemble.disk import checksums, remove_half_written, write_folder, write_json, writing
from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME, Manifest, MemberEntry, entry_of
from lm_eval_lora_ensemble.errors import EnsembleError

MEMBER = "member.json"


def member_name(index: int) -> str:
    """Return the name of a member and of its folder."""
    return f"member_{index:02d}"


class EnsembleWriter:
    """An ensemble's folder while it is made.

    Args:
        path: the folder; made when something is written.
        scratch: name of the folder in it that only its making needs.
        activity: what is done to a member, for the message about another process that does it.
    """

    def __init__(self, path: Path, scratch: str, activity: str) -> None:
        self.path = path
        self.scratch = path / scratch
        self.activity = activity

    @property
    def complete(self) -> bool:
        """Whether the manifest has been written."""
        return (self.path / FILE_NAME).is_file()

    def finished(self, name: str) -> bool:
        """Whether a member is done."""
        return (self.path / name / MEMBER).is_file()

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Keep other processes off a member; the operating system releases the lock of one that dies.

        Raises:
            EnsembleError: another process has it.
        """
        lock = FileLock(self.scratch / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise EnsembleError(
                f"another process is {self.activity} {name} in {self.path}; wait for it, or give another output="
            ) from None
        try:
            yield
        finally:
            lock.release()

    def sweep(self, name: str) -> None:
        """Remove what a killed process left half-written for a member."""
        for rest in [*self.scratch.glob(f"{name}.*"), *(self.path / name).glob(".*.tmp")]:
            if rest.is_dir():
                shutil.rmtree(rest)
            elif rest.suffix != ".lock":
                rest.unlink()

    def write_adapter(self, relative: str, fill: Callable[[Path], None]) -> None:
        """Write one adapter folder in one step.

        Args:
            relative: where, relative to the ensemble folder: ``member_00``, ``member_00/epoch_01``.
            fill: puts the adapter's files into the folder it is given.
        """
        with writing(self.path):
            write_folder(self.path / relative, self.scratch, fill)

    def write_entry(self, entry: MemberEntry, folder: Path | None = None) -> None:
        """Write a member's entry, which says that it is done, with the checksums of its files as they are now.

        Args:
            entry: without ``files``.
            folder: where the member's own folder is for the moment, if it is not in its place yet.
        """
        own = self.path / entry.folder if folder is None else folder
        files = {f"{entry.folder}/{name}": digest for name, digest in checksums(own, own).items()}
        for kept in (*entry.epochs.values(), *entry.steps.values()):
            files |= checksums(self.path / kept, self.path)
        with writing(self.path):
            write_json(own / MEMBER, replace(entry, files=files).as_mapping())

    def entry(self, name: str) -> MemberEntry:
        """Return the entry of a member that is done.

        Raises:
            EnsembleError: it cannot be read.
        """
        path = self.path / name / MEMBER
        try:
            return entry_of(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise EnsembleError(
                f"{path} is not a readable entry of a member ({type(error).__name__}: {error}); remove "
                f"{path.parent} and run the same command again"
            ) from error

    def entries(self, names: Sequence[str]) -> list[MemberEntry]:
        """Return the entries of members that are all done."""
        return [self.entry(name) for name in names]

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, and remove what only the making needed."""
        with writing(self.path):
            manifest.write(self.path)
        remove_half_written(self.path)
        shutil.rmtree(self.scratch, ignore_errors=True)
