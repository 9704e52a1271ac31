"""Another checkout's engine against this one's: the same work, a process each, taking turns.

Each engine runs the work once, unmeasured; then pair after pair both run it, one after the other, and who is first
changes from pair to pair (A B, B A, A B, …), so that a machine that gets slower or faster favours neither. A pair's
ratio is this checkout's seconds ÷ the other's: above 1 this checkout is slower. Reported are the median of the ratios
and a 95 % interval: Student's t for the mean of their logarithms, which supposes that the pairs are independent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from worker import PACKAGE

HERE = Path(__file__).resolve().parents[1]
METHOD = "95 % interval: Student's t for the mean of the log ratios"


def checkout_folder(text: str) -> Path:
    """Return the root of a checkout named on the command line.

    Raises:
        ArgumentTypeError: there is none.
    """
    root = Path(text).resolve()
    if not (root / PACKAGE / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(
            f"{text}: no {PACKAGE}/__init__.py there; name the root of a checkout"
        )
    return root


def python_of(root: Path) -> str:
    """Return a checkout's own interpreter, the running one if it has none or is this checkout."""
    own = root / ".venv" / "bin" / "python"
    return str(own) if root != HERE and own.exists() else sys.executable


def commit(root: Path) -> str:
    """Name a checkout's commit, ``-dirty`` if files differ from it."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--against`` and ``--pairs`` to a benchmark's command line."""
    parser.add_argument(
        "--against", type=checkout_folder, metavar="CHECKOUT", help="compare with another checkout's engine"
    )
    parser.add_argument(
        "--pairs",
        type=several,
        default=6,
        help="with --against: measured pairs; even, so that each is first as often",
    )


def several(text: str) -> int:
    """Return a number of pairs from which an interval can be had."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError("give a whole number of at least 2; one pair has no interval")
    return int(text)


class Engine:
    """The engine of a checkout in a process of its own, which computes only while it is called.

    Args:
        root: the checkout.
        kind: ``scoring`` or ``training``.
        settings: see ``worker.py``.
    """

    def __init__(self, root: Path, kind: str, settings: dict[str, Any]) -> None:
        self.root = root
        # the environment's start-up file would import the package that is installed there
        environment = {**os.environ, "LM_EVAL_LORA_ENSEMBLE_AUTOLOAD": "0"}
        words = [python_of(root), str(Path(__file__).with_name("worker.py")), str(root), kind]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        try:
            self._write(settings)
            self.description = self.call("describe")
        except BaseException:
            self.close()
            raise

    def timed(self, method: str, *arguments: Any) -> tuple[float, Any]:
        """Let the engine do something; return its seconds and what it returns.

        Raises:
            SystemExit: the process ended; what it said is on standard error.
        """
        assert self.process.stdout is not None
        self._write([method, *arguments])
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            sys.exit(f"the engine of {self.root} ended with exit status {status} in {method!r}; see above")
        reply = json.loads(line)
        return reply["seconds"], reply["value"]

    def _write(self, message: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended, which reading its answer will tell
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def call(self, method: str, *arguments: Any) -> Any:
        """Let the engine do something and return what it returns."""
        return self.timed(method, *arguments)[1]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def both(kind: str, other: Path, settings: dict[str, Any]) -> Iterator[tuple[Engine, Engine]]:
    """Yield this checkout's engine and another's, loaded with the same settings, and end both afterwards."""
    this_engine = Engine(HERE, kind, settings)
    try:
        other_engine = Engine(other, kind, settings)
        try:
            yield this_engine, other_engine
        finally:
            other_engine.close()
    finally:
        this_engine.close()


@dataclass
class PairedTimes:
    """Seconds of both engines for one piece of work, pair by pair.

    Attributes:
        work: what was done.
        this_seconds: this checkout's.
        other_seconds: the other's.
        differences: the largest absolute differences of what they returned, by name.
    """

    work: str
    this_seconds: list[float] = field(default_factory=list)
    other_seconds: list[float] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """This checkout's seconds ÷ the other's, pair by pair."""
        return [mine / theirs for mine, theirs in zip(self.this_seconds, self.other_seconds, strict=True)]

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the ratio."""
        logarithms = np.log(self.ratios)
        n = len(logarithms)
        half = stats.t.ppf(0.975, n - 1) * logarithms.std(ddof=1) / np.sqrt(n)
        return float(np.exp(logarithms.mean() - half)), float(np.exp(logarithms.mean() + half))

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for a JSON file."""
        return {
            **vars(self),
            "ratios": self.ratios,
            "median_ratio": statistics.median(self.ratios),
            "interval_95": self.interval,
        }


def alternate(
    times: PairedTimes,
    engines: tuple[Engine, Engine],
    pairs: int,
    after_turn: Callable[[Any, Any], None] = lambda *_: None,
) -> None:
    """Time ``run`` of both engines in turns.

    Args:
        times: takes the seconds.
        engines: this checkout's and the other's.
        pairs: how many of each are measured, after one that is not.
        after_turn: sees what both returned, the unmeasured turn included.
    """
    for pair in range(-1, pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        turns: list[tuple[float, Any]] = [(0.0, None), (0.0, None)]
        for which in order:
            turns[which] = engines[which].timed("run")
        after_turn(turns[0][1], turns[1][1])
        if pair >= 0:
            times.this_seconds.append(turns[0][0])
            times.other_seconds.append(turns[1][0])


def saved_difference(engines: tuple[Engine, Engine], scratch: Path) -> float:
    """Return the largest difference of the arrays that both engines save."""
    arrays = []
    for engine, name in zip(engines, ("this", "other"), strict=True):
        path = scratch / f"{name}.npy"
        engine.call("save", str(path))
        arrays.append(np.load(path))
    return float(np.abs(arrays[0] - arrays[1]).max())


def provenance(engines: tuple[Engine, Engine]) -> dict[str, Any]:
    """Return what was compared, where, and how much memory it took."""
    sides = {}
    for name, engine in zip(("this", "other"), engines, strict=True):
        sides[name] = {"commit": commit(engine.root), **engine.description}
        sides[name]["peak_gib"] = engine.call("peak_bytes") / 2**30
    return {**sides, "interval": METHOD}


def table(rows: list[PairedTimes], compared: dict[str, Any], heading: str, peak: str) -> str:
    """Return the comparison as a Markdown table with the lines that say what it is."""
    this, other = compared["this"], compared["other"]
    lines = [heading, f"this checkout {this['commit']}, the other {other['commit']}"]
    if this["versions"] != other["versions"]:
        lines.append(f"NOT THE SAME VERSIONS: this {this['versions']}, the other {other['versions']}")
    kinds = list(rows[0].differences)
    columns = ["work", "pairs", "this, s", "other, s", "this ÷ other", "95 %"]
    columns += [f"largest difference of {kind}" for kind in kinds]
    lines += ["", "|" + "|".join(columns) + "|", "|---|" + "---:|" * (len(columns) - 1)]
    for row in rows:
        low, high = row.interval
        cells = [row.work, str(len(row.ratios))]
        cells += [
            f"{statistics.median(each):.3f}" for each in (row.this_seconds, row.other_seconds, row.ratios)
        ]
        cells += [f"{low:.3f}–{high:.3f}", *(f"{row.differences[kind]:.1e}" for kind in kinds)]
        lines.append("|" + "|".join(cells) + "|")
    lines += ["", f"seconds and ratio: medians; {METHOD}", peak]
    lines.append(f"peak memory: this {this['peak_gib']:.2f} GiB, the other {other['peak_gib']:.2f} GiB")
    return "\n".join(lines)


def report(
    rows: list[PairedTimes], compared: dict[str, Any], *, heading: str, peak: str, json_file: Path | None
) -> None:
    """Print the comparison and, if asked, write it as JSON."""
    print(table(rows, compared, heading, peak))
    if json_file:
        result = {"setting": heading, **compared, "peak": peak, "rows": [row.as_dict() for row in rows]}
        json_file.write_text(json.dumps(result, indent=2))
