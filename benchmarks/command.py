"""Whole commands: ``lm_eval --model lora-ensemble`` with N members against ``lm_eval --model hf`` with one.

What a user waits for: starting Python, loading the base model and adapters, building the task, scoring, metrics
and files. The two commands alternate; reported are medians, their ratio, and the peak memory of each, and how
fast the machine's matrix products are.

    python benchmarks/command.py --task arc_easy --limit 200
    python benchmarks/command.py --adapters my/ensemble --base my/base --task hellaswag --limit 100 --repeats 1

Without network access to the Hub run it where lm-eval finds the data.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import description
from peak import gemm_peak, linear_shapes, meaning, meta_model
from transformers import AutoConfig
from workload import random_adapters

from lm_eval_lora_ensemble.ensemble.base_model import resolve
from lm_eval_lora_ensemble.precision import fast_dtype


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2", help="base model: a folder, a Hub id, or smollm2")
    parser.add_argument("--adapters", type=Path, help="folder of adapters (default: random ones)")
    parser.add_argument("--members", type=int, default=5, help="random adapters made (default 5)")
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: the fast one here")
    parser.add_argument("--hf-batch-size", default="8")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.dtype = options.dtype or str(fast_dtype(options.device)).removeprefix("torch.")
    return options


def main() -> None:
    """Print the comparison as JSON."""
    options = arguments()
    base = resolve(options.base)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.adapters or random_adapters(
            AutoConfig.from_pretrained(base), base, Path(scratch) / "adapters", options.members
        )
        first = sorted(path for path in folder.iterdir() if path.is_dir())[0]
        commands = {
            "hf": ["hf", f"pretrained={base},peft={first}", options.hf_batch_size],
            "lora-ensemble": ["lora-ensemble", f"pretrained={base},adapters={folder}", "auto"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        peaks: dict[str, list[int]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, (model, model_args, batch_size) in commands.items():
                words = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--tasks", options.task]
                words += ["--model_args", f"{model_args},dtype={options.dtype}", "--batch_size", batch_size]
                words += ["--limit", str(options.limit), "--device", options.device, "--log_samples"]
                words += ["--output_path", f"{scratch}/out"]
                start = time.perf_counter()
                peaks[name].append(run(words))
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    # only now: what a child inherits of this process's peak memory would count as its own
    peak = gemm_peak(
        linear_shapes(meta_model(AutoConfig.from_pretrained(base))),
        getattr(torch, options.dtype),
        options.device,
    )
    report = {
        "setting": {name: str(value) for name, value in vars(options).items()},
        **description(options.device),
        "gemm_peak": meaning(peak, options.dtype, options.device),
        "gemm_peak_tflops": peak / 1e12,
        "seconds": medians,
        "all_seconds": seconds,
        "ratio": medians["lora-ensemble"] / medians["hf"],
        "peak_gib": {name: max(values) / 2**30 for name, values in peaks.items()},
    }
    print(json.dumps(report, indent=2))


def run(words: list[str]) -> int:
    """Run a command to its end and return its peak resident set in bytes.

    Raises:
        SystemExit: it failed; what it said is shown.
    """
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(words, stdout=said, stderr=said)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(words)}\n{said.read().decode(errors='replace')[-3000:]}")
    # this process is small while commands run, so what a child inherits of its peak does not count
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
