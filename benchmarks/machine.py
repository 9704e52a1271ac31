"""What every benchmark says and measures the same way: the machine, the versions, seconds and peak memory."""

from __future__ import annotations

import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("lm_eval", "torch", "transformers", "peft")


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Return seconds and result of a call, the device's queue empty before and after."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - start, result


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(device: str = "cpu") -> int:
    """Return the most memory this process has had: the allocator's on a GPU, else its resident set.

    On Linux not from ``getrusage``: its maximum survives ``exec``, so a child of a large process starts with the
    parent's.
    """
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():
        high_water = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="ascii"), re.MULTILINE)
        if high_water:
            return int(high_water[1]) * 1024
    # in bytes on macOS, in kilobytes elsewhere
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor(device: str = "cpu") -> str:
    """Name the processor that ``device`` is; Linux tells a CPU's name in /proc/cpuinfo alone, and not on every one."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = re.search(r"^model name\s*:\s*(\S.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if name:
            return name[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the releases of Python and of the packages that a speed depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def description(device: str) -> dict[str, Any]:
    """Return what a result has to say about where it was taken."""
    return {"processor": processor(device), "threads": torch.get_num_threads(), "versions": versions()}


def headline(device: str, dtype: str) -> str:
    """Return the same as one line."""
    releases = ", ".join(f"{name} {release}" for name, release in versions().items())
    return f"{dtype}, {processor(device)}, {torch.get_num_threads()} threads, {releases}"
