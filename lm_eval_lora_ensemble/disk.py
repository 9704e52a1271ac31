"""Everything that touches files: whole or not at all, checked, bounded.

Guaranteed:
    * a file or folder written here appears under its name complete and flushed, or not at all; whoever reads
      meanwhile sees the old one or the new one, never a mixture, and after a kill at any instant one of the two;
    * what is half-written lies under a hidden name or in a folder of :data:`NOT_TO_READ`, which no reader of ours
      opens, and the next write of the same thing removes it;
    * JSON from a stranger is read to a bounded size and depth, and refused in one line.

Traded away: a moment of twice the disk space, and the time of a flush.

Out of scope: a disk that loses what it confirmed; file systems without rename; two machines that write one target
at once. Where two folders cannot be exchanged in one step (systems other than Linux and macOS, some network file
systems), replacing one takes two renames: a kill between them leaves nothing under the name and the old folder
whole under a hidden one beside it, and the next write to that name first puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from lm_eval_lora_ensemble.errors import EnsembleError

UNFINISHED, FINISHED, IN_PROGRESS = ".unfinished", ".finished", ".in_progress"
NOT_TO_READ = {UNFINISHED, FINISHED, IN_PROGRESS}
"""Folders that hold what a killed run or sweep left; other names with a dot may be a model's, as of ``./model``."""

MAX_JSON_DEPTH = 32

_PACKAGE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------- whole or not at all


def flush(path: Path) -> None:
    """Bring a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place, flush it and rename it: a reader sees old or new, never half."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        flush(scratch)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def remove_half_written(folder: Path) -> None:
    """Remove what processes that no longer run left of files that :func:`write_text` was to put into ``folder``.

    One that still runs may be about to rename its own: two processes that finish together write the same files.
    """
    for scratch in folder.glob(".*.tmp"):
        writer = scratch.name.removesuffix(".tmp").rpartition(".")[2]
        if writer.isdecimal() and not _another_runs(int(writer)):
            scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, as :func:`write_text` writes."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


def copy_file(source: Path, target: Path, scratch_parent: Path) -> None:
    """Copy a file beside its place, flush it and rename it."""
    scratch = scratch_parent / f"{target.parent.name}.{target.name}.{os.getpid()}"
    shutil.copyfile(source, scratch)
    flush(scratch)
    scratch.replace(target)


def write_folder(target: Path, scratch_parent: Path | None, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a folder beside its place, flush every file and put the folder at ``target`` in one step.

    Args:
        target: where the folder will be; an older one is replaced.
        scratch_parent: where it is written meanwhile, on the same file system; None for a hidden name beside
            ``target``.
        fill: is given an empty folder.

    Raises:
        OSError: it cannot be written; ``target`` is as it was.
    """
    _put_back(target)
    _remove_leftovers(target, scratch_parent)
    scratch = _scratch(target, scratch_parent, str(os.getpid()))
    scratch.mkdir(parents=True)
    try:
        fill(scratch)
        for file in scratch.rglob("*"):
            flush(file)
        flush(scratch)
        put_folder(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _scratch(target: Path, parent: Path | None, writer: str) -> Path:
    if parent is None:
        return target.with_name(f".{target.name}.{writer}.writing")
    return parent / f"{target.parent.name}.{target.name}.{writer}"


def _remove_leftovers(target: Path, scratch_parent: Path | None) -> None:
    """Remove what killed processes of this machine, or this one, left half-written on the way to ``target``."""
    before, after = _scratch(target, scratch_parent, "\0").name.split("\0")
    parent = scratch_parent or target.parent
    for path in parent.iterdir() if parent.is_dir() else ():
        writer = path.name.removeprefix(before).removesuffix(after)
        if path.name == f"{before}{writer}{after}" and writer.isdecimal() and not _another_runs(int(writer)):
            shutil.rmtree(path, ignore_errors=True)


def _another_runs(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def put_folder(scratch: Path, target: Path) -> None:
    """Move the complete folder ``scratch`` to ``target``; an older one there is exchanged with it and removed.

    Raises:
        OSError: it cannot be moved; ``target`` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _put_back(target)
    if not target.exists():
        scratch.rename(target)
    elif _exchanged(scratch, target):
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        _replace_in_two_steps(scratch, target)
    flush(target.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False, and nothing changed, where the system has no such step."""
    paths, status = (os.fsencode(one), os.fsencode(other)), -1
    if sys.platform == "linux":
        if swap := getattr(ctypes.CDLL(None), "renameat2", None):
            at_cwd, exchange = -100, 2
            status = swap(at_cwd, paths[0], at_cwd, paths[1], exchange)
    elif sys.platform == "darwin":
        if swap := getattr(ctypes.CDLL(None), "renamex_np", None):
            status = swap(*paths, 2)
    return status == 0


def _replace_in_two_steps(scratch: Path, target: Path) -> None:
    aside = _aside(target)
    target.rename(aside)
    try:
        scratch.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _put_back(target: Path) -> None:
    """Undo a replacement that was killed between its two steps, and clear up after one killed behind them."""
    aside = _aside(target)
    if not aside.exists():
        return
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(target)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


@contextlib.contextmanager
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


def refuse_file(output: Path, said: str) -> None:
    """Refuse an output folder that is something else.

    Args:
        output: what is to be a folder; it need not be there yet.
        said: how it was given: ``output=place``, ``--output place``.

    Raises:
        EnsembleError: it is no folder.
    """
    if output.exists() and not output.is_dir():
        raise EnsembleError(f"{said} is a file; name a folder")


@contextlib.contextmanager
def all_or_nothing(folder: Path, lock: str) -> Iterator[Path]:
    """Give a hidden folder to fill; what is in it at the end appears in ``folder``, unless an error is raised.

    What a killed run left is put right first: what it had finished is moved into place, the rest removed.

    Args:
        folder: the destination; made if there is none.
        lock: name of the file in it that keeps two writers apart.
    """
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    unfinished, finished = folder / UNFINISHED, folder / FINISHED
    with FileLock(folder / lock):
        _move_into_place(finished, folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            yield unfinished
            unfinished.rename(finished)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        _move_into_place(finished, folder)


def _move_into_place(finished: Path, folder: Path) -> None:
    """Move every file to where it belongs; the results file comes last, so that who sees it sees its samples."""
    if not finished.is_dir():
        return
    files = (path for path in finished.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.suffix == ".json"):
        target = folder / path.relative_to(finished)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(finished)


# ---------------------------------------------------------------------------------------------- checksums


def sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def sampled_digest(folder: Path) -> str:
    """Return a hexadecimal sha256 that changes with the model in a folder, without reading all of its weights.

    Of config.json and of every file of weights it takes the name, the size and 64 pieces of 64 KiB, evenly spaced, of
    which the first holds a safetensors file's header. It is not for files that somebody may forge.
    """
    digest = hashlib.sha256()
    kinds = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
    for path in sorted(folder.iterdir()):
        if not path.is_file() or (path.suffix not in kinds and path.name != "config.json"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for i in range(_SAMPLES if size > _SAMPLES * _SAMPLE_BYTES else 1):
                stream.seek(i * size // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES if size > _SAMPLES * _SAMPLE_BYTES else size))
    return digest.hexdigest()


def checksums(folder: Path, relative_to: Path) -> dict[str, str]:
    """Return the sha256 of every file directly in ``folder``, by its path relative to ``relative_to``."""
    return {
        path.relative_to(relative_to).as_posix(): sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


# --------------------------------------------------------------------------------------- strangers' JSON


def read_json(path: Path, max_bytes: int, what: str = "readable JSON") -> Any:
    """Read a regular file as strict JSON.

    Args:
        path: the file; a pipe or device is refused, because reading it could wait for ever.
        max_bytes: the largest size that is read at all.
        what: what the message of an error says that the file is not.

    Raises:
        EnsembleError: the file cannot be read, is larger, or is not JSON as :func:`parse_json` takes it.
    """
    try:
        if not path.is_file():
            raise EnsembleError(f"{path} is not a file")
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise EnsembleError(f"{path} is not {what} ({error}); export it again") from error
    if len(data) > max_bytes:
        raise EnsembleError(f"{path} is not {what}: it is larger than {max_bytes:,} bytes")
    return parse_json(data, path, what)


def parse_json(data: bytes, path: Path, what: str = "readable JSON") -> Any:
    """Parse strict JSON that was read from ``path``, which the message of an error says is not ``what``.

    Raises:
        EnsembleError: not UTF-8, not JSON, a key twice in one object, NaN or Infinity, or nested deeper than
            ``MAX_JSON_DEPTH``.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
        if _depth(value) > MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    except RecursionError as error:
        raise EnsembleError(f"{path} is not {what} (nested deeper than {MAX_JSON_DEPTH} levels)") from error
    except ValueError as error:
        raise EnsembleError(f"{path} is not {what} ({error}); export it again") from error
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what readers disagree on: which of two equal keys counts."""
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"the key {key!r} is there twice")
        unique[key] = value
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _depth(value: Any) -> int:
    """Return how many containers deep ``value`` is nested; a plain value counts 0."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


# --------------------------------------------------------------------- where the top-level folders are


def _top_level(name: str) -> Path:
    """Return the folder of a sub-package that lives at the project's top level until it is installed."""
    for parent in (_PACKAGE, _PACKAGE.parent):
        if (parent / name / "__init__.py").is_file():
            return parent / name
    raise FileNotFoundError(f"{name}/ is neither in {_PACKAGE} nor beside it; the installation is incomplete")


def tasks_folder() -> Path:
    """Return the folder of lm-eval task YAMLs: in a wheel, an editable install or a plain checkout."""
    return _top_level("tasks")


def recipes_folder() -> Path:
    """Return the folder of training recipes, found like :func:`tasks_folder`."""
    return _top_level("train") / "recipes"
