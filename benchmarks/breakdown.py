"""Where the engine's time goes: torch's profiler, self time by kind of operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_ELEMENT_WISE = ("mul", "add", "silu", "gelu", "pow", "mean", "sum", "rsqrt", "neg", "sub", "div", "tanh")

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product", "aten::_flash", "flex"),
    "log-softmax, maximum": ("aten::_log_softmax", "aten::max", "aten::amax", "aten::argmax"),
    "joining parts": ("aten::lerp", "aten::logaddexp", "aten::exp"),
    "copies": ("aten::copy_", "aten::cat", "aten::_to_copy", "aten::clone", "aten::index"),
    "element-wise, norms": tuple(f"aten::{name}" for name in _ELEMENT_WISE),
}
"""Kinds of operation, and how the names of torch's operators in each begin. What is in none is "other"."""


def breakdown(call: Callable[[], Any]) -> dict[str, float]:
    """Return seconds of self CPU time by kind, of one call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
    seconds = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profile.key_averages():
        spent = event.self_cpu_time_total or 0
        if torch.cuda.is_available():
            spent = event.self_device_time_total or 0
        seconds[_kind(event.key)] += spent / 1e6
    return seconds


def _kind(name: str) -> str:
    for kind, beginnings in KINDS.items():
        if any(name == each or name.startswith(f"{each}_") for each in beginnings):
            return kind
    return "other"


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table, a task a column."""
    lines = ["| | " + " | ".join(rows) + " |", "|---|" + "---:|" * len(rows)]
    for kind in (*KINDS, "other"):
        cells = [f"{found[kind]:.2f} s, {found[kind] / sum(found.values()):.0%}" for found in rows.values()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
