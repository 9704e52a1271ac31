"""The child of ``lora-ensemble convert``: one pickle of tensors in, one safetensors file out.

Run as a script, in a process of its own: whatever a stranger's pickle does to its reader, it does not do it to the
process that checks the result. Imports nothing of the package.

    python -I unpickle.py SYS_PATH_AS_JSON PICKLE SAFETENSORS

Says on standard output, in one line, why it refuses, and then ends with ``REFUSED``.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path

REFUSED = 3
_SPARE_BYTES = 1 << 30
_COPIES = 4
"""Of the file in memory at a time: as read, as tensors, contiguous, as written."""


class RefusedError(Exception):
    """The pickle is not a dictionary of tensors; the text says what it is."""


def unpickle(source: Path, target: Path) -> None:
    """Read ``source`` with ``torch.load(weights_only=True)`` and write its tensors to ``target``.

    Raises:
        RefusedError: it asks for code, is damaged, or holds anything but tensors by their names.
    """
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)  # each further one reserves memory of its own
    _bound_memory(source.stat().st_size)
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        raise RefusedError(_reason(error)) from error
    if not isinstance(loaded, dict):
        raise RefusedError(f"it holds a {type(loaded).__name__}, not tensors by their names")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise RefusedError(
                f"it holds a {type(tensor).__name__} under {name!r}, where PEFT saves a tensor"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise RefusedError(f"{name!r} is no plain tensor")
    try:
        # a slice of a larger tensor, or one tensor under two names, is not what safetensors takes
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in loaded.items()}
        save_file(tensors, target, metadata={"format": "pt"})
    except RuntimeError as error:
        if "allocate" in str(error):  # torch's word for it
            raise MemoryError from error
        raise


def _reason(error: Exception) -> str:
    """Say in one line why torch refused a file; its own texts have many, and advise to trust the file."""
    text = str(error)
    named = re.search(r"GLOBAL (\S+)", text)
    if named:
        return f"it asks for {named[1]}, which is code, not a tensor"
    return f"torch cannot read it ({type(error).__name__})"


def _bound_memory(size: int) -> None:
    """Let this process grow by some copies of the file and no more, where the system can hold it to that."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows; macOS refuses or ignores it
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + _COPIES * size + _SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    try:
        unpickle(Path(sys.argv[2]), Path(sys.argv[3]))
    except (RefusedError, MemoryError) as refusal:
        print(refusal if isinstance(refusal, RefusedError) else "it takes more memory than its size explains")
        sys.exit(REFUSED)
