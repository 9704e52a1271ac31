"""One checkout's engine in a process of its own; ``against.py`` starts two of these and lets them take turns.

    python benchmarks/worker.py CHECKOUT scoring|training

The package is imported from CHECKOUT, whatever the environment has installed. The first line of standard input is the
engine's settings in JSON; each further one, ``[method, argument, …]``, is answered on standard output with
``{"seconds": …, "value": …}``. Between two lines the process computes nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from argparse import Namespace
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import description, peak_bytes, timed
from workload import with_random_weights

PACKAGE = "lm_eval_lora_ensemble"
# where the lm-eval model has lived, newest first; `backend` until release 0.1
MODEL_MODULES = ("harness.model", "backend")


class CheckoutFinder:
    """Finds the package in a checkout, its top-level folders (``train``, ``tasks``) as sub-packages included."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        """Find the package and what a checkout keeps beside it; the rest is found in the package's folder."""
        parent, _, child = name.rpartition(".")
        if name == PACKAGE:
            folder = self.root / PACKAGE
        elif parent == PACKAGE and not (self.root / PACKAGE / child).exists():
            folder = self.root / child
        else:
            return None
        entrance = folder / "__init__.py"
        if not entrance.is_file():
            return None
        return spec_from_file_location(name, entrance, submodule_search_locations=[str(folder)])


def import_from(root: Path) -> None:
    """Let the package be the one of a checkout.

    Raises:
        SystemExit: another one is imported already, as by an environment's start-up file.
    """
    sys.meta_path.insert(0, CheckoutFinder(root))
    place = Path(str(importlib.import_module(PACKAGE).__file__)).resolve().parent
    if place != root / PACKAGE:
        sys.exit(f"{PACKAGE} came from {place}, not from {root}; remove the start-up file that imports it")


def model_class() -> type:
    """Return the checkout's ``LoraEnsembleLM``, wherever its release keeps it."""
    folder = Path(str(importlib.import_module(PACKAGE).__file__)).parent
    for module in MODEL_MODULES:
        if (folder / f"{module.replace('.', '/')}.py").is_file():
            found: type = importlib.import_module(f"{PACKAGE}.{module}").LoraEnsembleLM
            return found
    sys.exit(
        f"{folder} has none of {', '.join(MODEL_MODULES)}; add the model's module to MODEL_MODULES of worker.py"
    )


class ScoringEngine:
    """Scores encoded requests; ``settings`` is what ``LoraEnsembleLM`` takes, and whether its weights are random."""

    def __init__(self, settings: dict[str, Any]) -> None:
        kind = model_class()
        self.device = settings["model"]["device"]
        self.lm: Any = (with_random_weights(kind) if settings["random_weights"] else kind)(
            **settings["model"]
        )

    def take(self, path: str) -> None:
        """Read the requests that are to be scored: a JSON list of [context tokens, continuation tokens]."""
        self.requests = [(None, *request) for request in json.loads(Path(path).read_text(encoding="ascii"))]

    def run(self) -> None:
        """Score all of them."""
        self.results = self.lm._loglikelihood_tokens(self.requests, disable_tqdm=True)

    def save(self, path: str) -> None:
        """Write the members' scores [requests, N]."""
        np.save(path, np.stack([score.members for score, _ in self.results]))


class TrainingEngine:
    """Takes joint steps; ``settings`` are the options of ``training.py``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from joint import Joint, base_model

        options = Namespace(**settings)
        torch.set_num_threads(options.threads or torch.get_num_threads())
        self.device = options.device
        self.joint = Joint(options, base_model(options))
        self.steps = 0

    def run(self) -> list[float]:
        """Take the next step of every member and return their losses."""
        losses = self.joint.step(self.steps)
        self.steps += 1
        return losses

    def save(self, path: str) -> None:
        """Write the members' weights as one vector."""
        np.save(path, self.joint.flat_weights())


ENGINES = {"scoring": ScoringEngine, "training": TrainingEngine}


def answer(engine: Any, method: str, arguments: list[Any]) -> dict[str, Any]:
    """Let the engine do one thing."""
    if method == "describe":
        return {"seconds": 0.0, "value": description(engine.device)}
    if method == "peak_bytes":
        return {"seconds": 0.0, "value": peak_bytes(engine.device)}
    seconds, value = timed(lambda: getattr(engine, method)(*arguments), engine.device)
    return {"seconds": seconds, "value": value}


def main(checkout: str, kind: str) -> None:
    """Answer one line after another until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    import_from(Path(checkout).resolve())
    engine = ENGINES[kind](json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(answer(engine, method, arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
