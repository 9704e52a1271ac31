"""Starts a training run over and over and kills it with SIGKILL, until told to let it finish.

    python train_kill_harness.py RECIPE.yaml KILLS SEED REFERENCE_SECONDS

One process imports everything once and forks a child for every attempt, so that an attempt costs its
training and not its imports. Half of the kills fall at random instants of a whole run; the others wait until
the child reports that it is in the middle of a step, a checkpoint, an epoch's or a snapshot's adapters or a
member's final files, and fall a random moment later. Prints one JSON object: what each child died of, and where.
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

from lm_eval.tasks import TaskManager  # noqa: E402

from lm_eval_lora_ensemble.harness import rendering  # noqa: E402
from lm_eval_lora_ensemble.train import checkpoint, folder, joint, trainer  # noqa: E402
from lm_eval_lora_ensemble.train.recipe import Recipe  # noqa: E402
from lm_eval_lora_ensemble.train.run import train_members  # noqa: E402

PHASES = {
    "step": (joint.JointEngine, "_gradients"),
    "checkpoint": (checkpoint, "_fill"),
    "retire": (checkpoint.shutil, "rmtree"),
    "epoch": (folder.EnsembleFolder, "write_epoch"),
    "snapshot": (folder.EnsembleFolder, "write_snapshot"),
    "measure": (trainer.Trainer, "_measure"),
    "finish": (folder.EnsembleFolder, "finish_member"),
}


def main() -> None:
    recipe_path, kills, seed, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    recipe = Recipe.load(recipe_path)
    rendering._task_manager = lambda path: TaskManager(include_path=path, include_defaults=False)
    generator = random.Random(seed)
    deaths = []
    while len(deaths) < kills:
        phase = generator.choice(list(PHASES)) if len(deaths) % 2 else None
        status = attempt(recipe, phase, generator, seconds)
        deaths.append(
            {"phase": phase or "any", "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}
        )
        if not os.WIFSIGNALED(status):
            deaths.pop()  # it finished before the kill: that one does not count
            assert os.WEXITSTATUS(status) == 0
            start_anew(recipe)
    status = attempt(recipe, None, None, seconds)
    print(json.dumps({"deaths": deaths, "last_exit": os.waitstatus_to_exitcode(status)}))


def start_anew(recipe: Recipe) -> None:
    """Begin another run in the same place after one that was done too soon."""
    shutil.rmtree(recipe.output)


def attempt(recipe: Recipe, phase: str | None, generator: random.Random | None, seconds: float) -> int:
    """Fork a child that trains; kill it unless ``generator`` is None; return its wait status."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        run_child(recipe, phase, writing)
    os.close(writing)
    if generator is not None:
        if phase is None:
            time.sleep(generator.uniform(0, seconds))
        else:
            # wait for the n-th report, or for the end of the child, which closes the pipe
            for _ in range(generator.randint(1, 3)):
                select.select([reading], [], [])
                os.read(reading, 1)
            time.sleep(generator.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    return status


def run_child(recipe: Recipe, phase: str | None, writing: int) -> None:
    """Train, reporting every entry into ``phase`` on the pipe."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    log = os.open(Path(recipe.output).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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
        train_members(recipe)
        code = 0
    except Exception:  # noqa: BLE001 – a forked child must not return into its parent's stack
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
