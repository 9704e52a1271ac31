"""Run the steps that have no record yet, one by one; say what is left and how long that will take.

In the output folder, ``records`` has a file for each step that is done: its command, seconds, machine and versions;
``logs`` has what each step printed; what the steps write is beside them.
"""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lm_eval_lora_ensemble.disk import read_json, write_json
from lm_eval_lora_ensemble.errors import EnsembleError

_PACKAGES = ("lm-eval-lora-ensemble", "lm-eval", "torch", "transformers", "peft")
_MAX_BYTES = 1 << 20
_STUDY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """One command that is run once.

    Attributes:
        name: its record's, a path below ``records``.
        kind: what it does, to what: steps of one kind are slower than guessed by one factor.
        command: Python's arguments; paths begin with ``{output}``, or with ``{study}`` for the folder of the scripts.
        guess: seconds on two cores with AVX2 in float32.
        writes: a folder that must be empty before it begins, below the output; "" where the command itself goes on.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    guess: float
    writes: str = ""


@dataclass(frozen=True)
class Record:
    """What is known of a step that is done.

    Attributes:
        command: as the step's, for folders may have moved.
        seconds: by the clock, start-up included; of the last attempt.
        cost: seconds of all cores together, which others on the machine hardly change; on a GPU by the clock.
        interrupted: whether there was an attempt before, whose time is not counted.
        machine: processor, threads and versions.
    """

    command: tuple[str, ...]
    seconds: float
    cost: float
    interrupted: bool
    machine: Mapping[str, Any]


def read_records(steps: Sequence[Step], output: Path) -> dict[str, Record]:
    """Return the records of the steps that are done, by name.

    Raises:
        EnsembleError: a step was done by another command, or a file that is no record.
    """
    records = {}
    for step in steps:
        path = _path(output, step)
        if not path.is_file():
            continue
        values = read_json(path, _MAX_BYTES)
        try:
            record = Record(**{**values, "command": tuple(values["command"])})
        except (TypeError, KeyError) as error:
            raise EnsembleError(
                f"{path} is no record of a step; remove it, and the step is run again"
            ) from error
        if record.command != step.command:
            changed = [word for word in step.command if word not in record.command]
            raise EnsembleError(
                f"{path}: done with other settings (now {' '.join(changed)}); give the same, or another --output"
            )
        records[step.name] = record
    return records


def estimate(steps: Sequence[Step], records: Mapping[str, Record]) -> dict[str, float]:
    """Return the seconds that each step without a record will take, by name.

    The first guess of each, times how much slower than guessed its kind was: the median over the kind's finished steps,
    or all finished steps together where the kind has none.
    """
    done = [step for step in steps if step.name in records and not records[step.name].interrupted]
    slower: dict[str, list[float]] = {}
    for step in done:
        slower.setdefault(step.kind, []).append(records[step.name].seconds / step.guess)
    guessed = sum(step.guess for step in done)
    overall = sum(records[step.name].seconds for step in done) / guessed if guessed else 1.0
    return {
        step.name: step.guess * (statistics.median(slower[step.kind]) if step.kind in slower else overall)
        for step in steps
        if step.name not in records
    }


def run(steps: Sequence[Step], output: Path) -> None:
    """Run every step that has no record, in order.

    Raises:
        EnsembleError: a step failed, and the message has its last line and where its log is; or another process is at
            work in the folder, and two would do each other's steps.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            _run_all(steps, output)
    except Timeout:
        raise EnsembleError(f"{output}: another process runs this study; wait for it, or end it") from None


def _run_all(steps: Sequence[Step], output: Path) -> None:
    records = read_records(steps, output)
    for number, step in enumerate(steps, 1):
        if step.name in records:
            continue
        left = estimate(steps, records)
        took = f"about {in_words(left[step.name])}, {in_words(sum(left.values()))} for all that is left"
        print(f"[{number}/{len(steps)}] {step.name}: {took}", flush=True)
        records[step.name] = _run(step, output)


def in_words(seconds: float) -> str:
    """Show a time.

    Example:
        >>> in_words(95.0), in_words(7500.0)
        ('1.6 min', '2.1 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def machine() -> dict[str, Any]:
    """Return what times depend on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _processor_seconds() -> float:
    """Return what the processes that this one waited for have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _path(output: Path, step: Step) -> Path:
    return output / "records" / f"{step.name}.json"


def _run(step: Step, output: Path) -> Record:
    path, log = _path(output, step), output / "logs" / f"{step.name}.txt"
    attempt = path.with_suffix(".attempt")
    interrupted = attempt.exists()
    for folder in (path.parent, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    attempt.touch()
    if step.writes:
        shutil.rmtree(output / step.writes, ignore_errors=True)
    command = [word.replace("{output}", str(output)).replace("{study}", str(_STUDY)) for word in step.command]
    began, spent = time.perf_counter(), _processor_seconds()
    with log.open("a", encoding="utf-8") as lines:
        ended = subprocess.run([sys.executable, *command], stdout=lines, stderr=lines, check=False)
    seconds = time.perf_counter() - began
    cost = seconds if torch.cuda.is_available() else _processor_seconds() - spent
    if ended.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        raise EnsembleError(f"{step.name} ended with status {ended.returncode}: {said[-1]}; its log is {log}")
    record = Record(step.command, round(seconds, 1), round(cost, 1), interrupted, machine())
    write_json(path, {**vars(record), "command": list(step.command)})
    attempt.unlink()
    return record
