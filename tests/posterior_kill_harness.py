"""Starts a drawing over and over and kills it with SIGKILL, then lets it finish.

    python posterior_kill_harness.py SOURCE OUTPUT SETTINGS KILLS SEED

One process imports everything once and forks a child for every attempt. The child reports on a pipe that it is in the
middle of a draw, a file, a checksum or the manifest; the kill falls after a random number of such reports and a random
moment. Prints one JSON object: what each child died of, and where.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

torch.set_num_threads(1)  # before any work: a forked child must not inherit a thread pool

from lm_eval_lora_ensemble import disk  # noqa: E402
from lm_eval_lora_ensemble.ensemble import writer  # noqa: E402
from lm_eval_lora_ensemble.posterior import draw as drawing  # noqa: E402
from lm_eval_lora_ensemble.posterior.methods.swag import SwagPosterior  # noqa: E402

PHASES = {
    "draw": (SwagPosterior, "draw"),
    "weights": (drawing, "save_file"),
    "entry": (writer, "checksums"),
    "flush": (disk, "flush"),
    "manifest": (writer.EnsembleWriter, "finish"),
}


def main() -> None:
    source, output, settings, kills, seed = sys.argv[1:]
    generator = random.Random(int(seed))
    deaths: list[dict[str, object]] = []
    while len(deaths) < int(kills):
        phase = list(PHASES)[len(deaths) % len(PHASES)]
        status = attempt(source, output, json.loads(settings), phase, generator)
        if os.WIFSIGNALED(status):
            deaths.append({"phase": phase, "signal": os.WTERMSIG(status)})
        else:  # it finished before the kill: that one does not count
            assert os.WEXITSTATUS(status) == 0
            shutil.rmtree(output)
    status = attempt(source, output, json.loads(settings), None, None)
    assert os.waitstatus_to_exitcode(status) == 0
    print(json.dumps({"deaths": deaths}))


def attempt(source, output, settings, phase, generator) -> int:
    """Fork a child that draws; kill it unless ``generator`` is None; return its wait status."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        run_child(source, output, settings, phase, writing)
    os.close(writing)
    if generator is not None:
        for _ in range(1 if phase == "manifest" else generator.randint(1, 5)):
            select.select([reading], [], [])
            os.read(reading, 1)
        time.sleep(generator.uniform(0, 0.003))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    return status


def run_child(source, output, settings, phase, writing) -> None:
    """Draw, reporting every entry into ``phase`` on the pipe."""
    log = os.open(Path(output).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if phase is not None:
        place, name = PHASES[phase]
        original = getattr(place, name)

        def reporting(*args, **kwargs):
            os.write(writing, b".")
            return original(*args, **kwargs)

        setattr(place, name, reporting)
    code = 1
    try:
        drawing.draw("multiswag", source, output=output, **settings)
        code = 0
    except Exception:  # noqa: BLE001 – a forked child must not return into its parent's stack
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
