"""Run the steps that have no record yet, as many at a time as wanted; say what is left and how long that will take.

In the output folder, ``records`` has a file for each step that is done: its command, seconds, machine and versions;
``logs`` has what each step printed; what the steps write is beside them.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lm_eval_lora_ensemble.disk import read_json, write_json
from lm_eval_lora_ensemble.errors import EnsembleError

RECORDS = "records"
"""The folder of what is known of the steps that are done."""

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
        needs: names of the steps that must be done before it begins.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    guess: float
    writes: str = ""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """What is known of a step that is done.

    Attributes:
        command: as the step's, for folders may have moved.
        seconds: by the clock, start-up included; of the last attempt.
        cost: seconds of all cores together, which others on the machine hardly change; on a GPU by the clock.
        interrupted: whether there was an attempt before, whose time is not counted.
        machine: processor, threads of the step, how many steps ran at a time, and versions.
    """

    command: tuple[str, ...]
    seconds: float
    cost: float
    interrupted: bool
    machine: Mapping[str, Any]

    @property
    def adapters(self) -> str:
        """What an evaluation's ``--model_args`` name, with ``{output}`` for the study's folder."""
        given = self.command[self.command.index("--model_args") + 1]
        return dict(pair.split("=", 1) for pair in given.split(","))["adapters"]


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
            now, then = (
                " ".join(word for word in one if word not in other) or "fewer words"
                for one, other in [(step.command, record.command), (record.command, step.command)]
            )
            raise EnsembleError(
                f"{path}: done with other settings ({then}; now {now}); give the same, or another --output"
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


def run(steps: Sequence[Step], output: Path, jobs: int = 1) -> None:
    """Run every step that has no record, in order, so many at a time.

    Args:
        steps: all of them.
        output: the study's folder.
        jobs: steps at a time; each has its share of the threads.

    Raises:
        EnsembleError: a step failed, and the message has its last line and where its log is; those that ran beside it
            were finished. Or another process is at work in the folder, and two would do each other's steps.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnsembleError(
                f"{output}: another process runs this study, or a step of it; wait for it, or end it"
            ) from None
        _Running(steps, output, jobs, lock.fileno()).run()


class _Running:
    """The steps at work, the records of those that are done, and what waits."""

    def __init__(self, steps: Sequence[Step], output: Path, jobs: int, lock: int) -> None:
        self.steps, self.output, self.jobs, self.lock = steps, output, jobs, lock
        self.threads = max(1, torch.get_num_threads() // jobs)
        self.records = read_records(steps, output)
        self.waiting = [step for step in steps if step.name not in self.records]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.stopping = False

    def run(self) -> None:
        pool = ThreadPoolExecutor(self.jobs)
        try:
            self._run_all(pool)
        except KeyboardInterrupt:
            self.stopping = True
            for process in list(self.processes.values()):
                process.terminate()
            raise
        finally:
            pool.shutdown()

    def _run_all(self, pool: ThreadPoolExecutor) -> None:
        at_work: dict[Future[Record], Step] = {}
        failed: EnsembleError | None = None
        while at_work or (self.waiting and not failed):
            for step in self._ready()[: 0 if failed else self.jobs - len(at_work)]:
                self._announce(step)
                self.waiting.remove(step)
                at_work[pool.submit(self._run, step)] = step
            for done in wait(at_work, return_when=FIRST_COMPLETED).done:
                step = at_work.pop(done)
                try:
                    self.records[step.name] = done.result()
                except EnsembleError as error:
                    failed = failed or error
                    if at_work:
                        print(f"{error}; the others are finished first", flush=True)
        if failed:
            raise failed

    def _ready(self) -> list[Step]:
        left = {step.name for step in self.steps} - self.records.keys()
        return [step for step in self.waiting if left.isdisjoint(step.needs)]

    def _announce(self, step: Step) -> None:
        left = estimate(self.steps, self.records)
        number, whole = self.steps.index(step) + 1, sum(left.values()) / self.jobs
        took = f"about {in_words(left[step.name])}, {in_words(whole)} for all that is left"
        print(f"[{number}/{len(self.steps)}] {step.name}: {took}", flush=True)

    def _run(self, step: Step) -> Record:
        path, log = _path(self.output, step), self.output / "logs" / f"{step.name}.txt"
        attempt = path.with_suffix(".attempt")
        interrupted = attempt.exists()
        for folder in (path.parent, log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        attempt.touch()
        if step.writes:
            shutil.rmtree(self.output / step.writes, ignore_errors=True)
        places = {"{output}": str(self.output), "{study}": str(_STUDY)}
        command = [sys.executable, *step.command]
        for mark, place in places.items():
            command = [word.replace(mark, place) for word in command]
        began = time.perf_counter()
        with log.open("a", encoding="utf-8") as lines:
            before = lines.seek(0, os.SEEK_END)
            # a step outlives a study that is killed, and holds its lock
            process = subprocess.Popen(
                command,
                stdout=lines,
                stderr=lines,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                pass_fds=(self.lock,),
            )
            self.processes[step.name] = process
            if self.stopping:
                process.terminate()
            # of this process alone: others end meanwhile
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        del self.processes[step.name]
        seconds = time.perf_counter() - began
        cost = seconds if torch.cuda.is_available() else used.ru_utime + used.ru_stime
        if process.returncode:
            said = log.read_bytes()[before:].decode(errors="replace").strip().splitlines()
            last = said[-1] if said else "it said nothing"
            raise EnsembleError(
                f"{step.name} ended with status {process.returncode}: {last}; its log is {log}"
            )
        at_work = machine(self.threads, self.jobs)
        record = Record(step.command, round(seconds, 1), round(cost, 1), interrupted, at_work)
        write_json(path, {**vars(record), "command": list(step.command)})
        attempt.unlink()
        return record


def in_words(seconds: float) -> str:
    """Show a time.

    Example:
        >>> in_words(95.0), in_words(7500.0)
        ('1.6 min', '2.1 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def machine(threads: int, jobs: int) -> dict[str, Any]:
    """Return what times depend on."""
    return {
        "processor": _processor(),
        "threads": threads,
        "steps at a time": jobs,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _path(output: Path, step: Step) -> Path:
    return output / RECORDS / f"{step.name}.json"
