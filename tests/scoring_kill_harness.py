"""Starts an evaluation over and over and kills it with SIGKILL, until told to let it finish.

    python scoring_kill_harness.py FOLDER KILLS SEED

FOLDER holds ``adapters`` and ``tasks``. Each chain of runs there, ``chain_000`` and so on, has a cache and an output
folder of its own, some killed runs and a last one that is left to finish; ``reference`` is one that nobody killed.
One process imports everything once and forks a child for every run, which is lm-eval's own command. Half of the
kills fall at random instants of a whole run; the others wait until the child reports that it is scoring, storing a
score, writing results or moving them into place, and fall a random moment later.

Prints one JSON object: what each child died of and where, and what was found amiss after each death.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import tqdm

torch.set_num_threads(1)  # before any work: a forked child must not inherit a thread pool
tqdm.tqdm.monitor_interval = 0  # nor tqdm's thread

from lm_eval.__main__ import cli_evaluate  # noqa: E402
from lm_eval.api.model import CacheHook, hash_args  # noqa: E402
from lm_eval.loggers import EvaluationTracker  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from lm_eval_lora_ensemble.harness import model as backend  # noqa: E402
from lm_eval_lora_ensemble.harness import plugin  # noqa: E402
from lm_eval_lora_ensemble.scoring.packed import PackedScorer  # noqa: E402

# phase: what reports it, how many reports a run may have, seconds until the kill
PHASES = {
    "score": (PackedScorer, "_run", 20, 0.01),
    "store": (CacheHook, "add_partial", 80, 0.001),
    "write": (EvaluationTracker, "save_results_samples", 2, 0.0005),
    "move": (Path, "replace", 3, 0.0002),
}
REPORTS = 100  # the descriptor a child reports on


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    prepare(folder)
    draw = random.Random(seed)
    start = time.monotonic()
    assert attempt(folder, "reference", None) == 0
    seconds = time.monotonic() - start
    report: dict = {"deaths": [], "lost": [], "changed": [], "torn": [], "chains": 0, "seconds": seconds}
    while len(report["deaths"]) < kills:
        chain = f"chain_{report['chains']:03d}"
        report["chains"] += 1
        for _ in range(draw.randint(1, 6)):
            phase = list(PHASES)[len(report["deaths"]) // 2 % 4] if len(report["deaths"]) % 2 else None
            before = stored(folder / chain)
            status = attempt(folder, chain, lambda *child, p=phase: kill(*child, p, draw, seconds))
            if not os.WIFSIGNALED(status):
                assert os.WEXITSTATUS(status) == 0, f"see {folder / chain}.log"
                break  # it finished before the kill, which does not count
            after = examine(folder / chain, before, report)
            report["deaths"].append(
                {"phase": phase or "any", "signal": os.WTERMSIG(status), "stored": len(after)}
            )
            if len(report["deaths"]) == kills:
                break
        assert attempt(folder, chain, None) == 0, f"see {folder / chain}.log"
        examine(folder / chain, stored(folder / chain), report)
    print(json.dumps(report))


def prepare(folder: Path) -> None:
    """Make forked runs cheap, finding only these tasks, with imports and the data set loaded; report phases."""
    for phase, (place, name, _, _) in PHASES.items():
        setattr(place, name, reporting(getattr(place, name), phase[:1].encode()))
    plugin.register_model()
    stock = TaskManager.__init__
    TaskManager.__init__ = lambda self, *args, **kwargs: stock(
        self, *args, **{**kwargs, "include_defaults": False}
    )
    backend.MIN_TOKENS = 32  # small packs: many instants between the first score and the last
    backend.LoraEnsembleLM(adapters=str(folder / "adapters"), device="cpu")
    TaskManager(include_path=str(folder / "tasks")).load(["both"])


def attempt(folder: Path, chain: str, killer: Callable[[int, int], None] | None) -> int:
    """Fork a child that evaluates; return its wait status."""
    (folder / chain).mkdir(exist_ok=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        run_child(folder, chain, writing)
    os.close(writing)
    if killer is not None:
        killer(child, reading)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    return status


def kill(child: int, reading: int, phase: str | None, draw: random.Random, seconds: float) -> None:
    """Kill a child at some instant of its run, or of a phase of it that it reports on the pipe."""
    if phase is None:
        time.sleep(draw.uniform(0, seconds))
    else:
        _, _, reports, moment = PHASES[phase]
        wanted, mark = draw.randint(1, reports), phase[:1].encode()
        while wanted > 0:
            select.select([reading], [], [])
            seen = os.read(reading, 1)
            if not seen:
                return  # the end of the child closed the pipe
            wanted -= seen == mark
        time.sleep(draw.uniform(0, moment))
    os.kill(child, signal.SIGKILL)


def run_child(folder: Path, chain: str, writing: int) -> None:
    """Run lm-eval's command, reporting phases on the pipe and every stored score in a file."""
    log = os.open(folder / f"{chain}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    told = os.open(folder / chain / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    store = CacheHook.add_partial

    def storing(self, attr, req, res):
        store(self, attr, req, res)
        os.write(told, hash_args(attr, req).encode() + b"\n")

    CacheHook.add_partial = storing
    os.dup2(writing, REPORTS)
    sys.argv = [
        *("lm_eval", "run", "--model", "lora-ensemble", "--model_args", f"adapters={folder / 'adapters'}"),
        *("--device", "cpu", "--batch_size", "1", "--tasks", "both", "--log_samples"),
        *("--include_path", str(folder / "tasks"), "--use_cache", str(folder / chain / "cache")),
        *("--output_path", str(folder / chain / "out")),
    ]
    code = 1
    try:
        cli_evaluate()
        code = 0
    except BaseException:  # noqa: BLE001 – a forked child must not return into its parent's stack
        traceback.print_exc()
    finally:
        os._exit(code)


def reporting(original: Callable, mark: bytes) -> Callable:
    def report(*args, **kwargs):
        with contextlib.suppress(OSError):  # nobody listens in the parent
            os.write(REPORTS, mark)
        return original(*args, **kwargs)

    return report


def stored(chain: Path) -> dict[str, bytes]:
    """Read what the cache of a chain holds, as whoever opens it next will find it."""
    database = chain / "cache_rank0.db"
    if not database.is_file():
        return {}
    with sqlite3.connect(database) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall()
        return dict(connection.execute("SELECT key, value FROM unnamed").fetchall()) if tables else {}


def examine(chain: Path, before: dict[str, bytes], report: dict) -> dict[str, bytes]:
    """Note what a death did: stored scores gone or changed, and files in the output that end in the middle."""
    after = stored(chain)
    told = (chain / "told").read_text().split() if (chain / "told").is_file() else []
    report["lost"] += sorted({*before, *told} - set(after))
    report["changed"] += [key for key, value in before.items() if after.get(key, value) != value]
    for file in (chain / "out").rglob("*.json*"):
        if not any(part.startswith(".") for part in file.relative_to(chain).parts) and not whole(file):
            report["torn"].append(str(file))
    return after


def whole(file: Path) -> bool:
    """Whether a file of lm-eval's can be read to its end, and a results file has its samples beside it."""
    try:
        if file.suffix == ".jsonl":
            return file.read_text().endswith("\n") and all(map(json.loads, file.open()))
        tasks = json.loads(file.read_text())["configs"]
    except ValueError:
        return False
    date = file.stem.removeprefix("results_")
    return all(file.with_name(f"samples_{task}_{date}.jsonl").is_file() for task in tasks)


if __name__ == "__main__":
    main()
