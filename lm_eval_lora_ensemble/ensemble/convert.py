"""``lora-ensemble convert FOLDER``: adapters saved as pickles (adapter_model.bin) become safetensors.

Before 2024 PEFT saved pickles, and reading a pickle can run what it holds. It is read here by torch's reader that
builds tensors and nothing else, in a child process of bounded time and memory; what comes out is checked as every
adapter is before it gets its name. The pickle stays.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from lm_eval_lora_ensemble.disk import flush
from lm_eval_lora_ensemble.ensemble import unpickle
from lm_eval_lora_ensemble.ensemble.adapters.folder import (
    PICKLE,
    WEIGHTS,
    check_adapter,
    check_config,
    find_config,
    inside,
    regular_file,
)
from lm_eval_lora_ensemble.ensemble.adapters.foreign import refuse_lfs_pointer
from lm_eval_lora_ensemble.ensemble.adapters.weights import MAX_BYTES, read_weights
from lm_eval_lora_ensemble.ensemble.members import Source, find_sources
from lm_eval_lora_ensemble.errors import EXIT_CODE, EnsembleError, one_line

# the first release whose reader of weights alone has no known way round it (CVE-2025-32434, CVE-2026-24747)
SAFE_TORCH = (2, 10)
_START_SECONDS = 120
"""For the child to import torch on a busy machine."""
_BYTES_PER_SECOND = 10_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "folder",
        type=Path,
        help="an adapter with adapter_model.bin, a folder of adapters, or an ensemble folder",
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert every member and kept epoch; return 0 if all are safetensors now, 2 if any is not."""
    folder = arguments.folder.expanduser()
    if not folder.is_dir():
        raise EnsembleError(
            f"no adapter folder {str(folder)!r} here ({Path.cwd()}); check the path, or fetch an adapter from the "
            "Hugging Face Hub with `hf download NAME --local-dir FOLDER` first"
        )
    sources, _ = find_sources(folder)
    refused = 0
    for name, adapter, root in _adapters(sources):
        try:
            done = f"{WEIGHTS} written" if convert(adapter, root) else "already converted"
            print(one_line(f"{name}: {done}"))
        except EnsembleError as error:  # noqa: PERF203 - one bad member must not keep the others
            refused += 1
            print(one_line(f"{name}: NOT CONVERTED, {error}"))
    return EXIT_CODE if refused else 0


def _adapters(sources: list[Source]) -> Iterator[tuple[str, Path, Path]]:
    """Yield every adapter's name, folder and the folder that its links may not leave."""
    for source in sources:
        yield source.name, source.folder, source.root
        for epoch, folder in sorted(source.epochs.items()):
            yield f"{source.name}, epoch {epoch}", folder, source.root


def convert(folder: Path, root: Path) -> bool:
    """Write one adapter's adapter_model.safetensors from its adapter_model.bin, unless it is there.

    Args:
        folder: the adapter, with links followed.
        root: what its links may not leave; see :func:`.adapters.folder.link_root`.

    Returns:
        Whether it was written now. An adapter that has it already is checked instead.

    Raises:
        EnsembleError: the folder is no LoRA adapter, the pickle holds more than tensors, or the adapter that
            comes out is not sound. Nothing is written then.
    """
    if regular_file(folder, WEIGHTS, root):
        check_adapter(folder, root)
        return False
    config = find_config(folder, root)
    if not regular_file(folder, PICKLE, root):
        check_config(folder, root)
    pickle = inside(folder / PICKLE, root)
    refuse_lfs_pointer(pickle)
    if pickle.stat().st_size > MAX_BYTES:
        raise EnsembleError(
            f"{pickle} has {pickle.stat().st_size:,} bytes; an adapter has at most {MAX_BYTES:,}"
        )
    _require_safe_torch()
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as scratch:
            written = Path(scratch) / WEIGHTS
            _unpickle(pickle, written)
            try:
                read_weights(written, config)
            except EnsembleError as error:
                raise EnsembleError(str(error).replace(str(written), str(pickle))) from error
            written.chmod(pickle.stat().st_mode & 0o777)
            flush(written)
            written.replace(folder / WEIGHTS)
        flush(folder)
    except OSError as error:
        raise EnsembleError(
            f"cannot write in {folder}: {error.strerror}; make room there, or copy it"
        ) from error
    return True


def _require_safe_torch() -> None:
    installed = version("torch")
    numbers = tuple(int(number) for number in re.findall(r"\d+", installed)[:2])
    if numbers < SAFE_TORCH:
        wanted = ".".join(map(str, SAFE_TORCH))
        raise EnsembleError(
            f"torch {installed} has known ways to run code from a pickle even where it promises to read weights "
            f"alone; convert with torch {wanted} or later, in another environment if need be"
        )


def _unpickle(pickle: Path, target: Path) -> None:
    """Let a child process read the pickle and write safetensors to ``target``.

    Raises:
        EnsembleError: it refuses the pickle, takes too long, or dies.
    """
    # isolated: neither the current folder nor an environment variable says where modules are, but our own path
    path = json.dumps([entry for entry in sys.path if entry])
    command = [sys.executable, "-I", unpickle.__file__, path, str(pickle), str(target)]
    seconds = _START_SECONDS + pickle.stat().st_size / _BYTES_PER_SECOND
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EnsembleError(
            f"{pickle} is refused: reading it took more than {seconds:.0f} s; have it saved as {WEIGHTS}"
        ) from error
    if child.returncode == unpickle.REFUSED:
        raise EnsembleError(
            f"{pickle} is refused: {child.stdout.strip()}; have the adapter saved as {WEIGHTS}"
        )
    if child.returncode != 0:
        last = child.stderr.strip().rpartition("\n")[2]
        raise EnsembleError(
            f"{pickle} could not be read (exit status {child.returncode}: {last}); have the adapter saved as {WEIGHTS}"
        )
