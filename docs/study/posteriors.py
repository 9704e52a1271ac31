"""The study of docs/posteriors.md, from base model to tables: ``python docs/study/posteriors.py --output FOLDER``.

Trains on ARC-Easy by one recipe, draws by every method, fits each method's temperature on the validation split,
evaluates with lm_eval, and fills the tables of the page, in FOLDER/posteriors.md. Every step is run once: stop it at
any time, the same command goes on where it was, and a larger size adds what is missing. It needs the benchmarks from
the Hub.

    python docs/study/posteriors.py --output study --plan                 # what would be run, and for how long
    python docs/study/posteriors.py --output study --seeds 1 --members 5  # the first of the replicates
    python docs/study/posteriors.py --output study --publish              # all, and docs/posteriors.md itself
"""

from __future__ import annotations

import argparse

from posterior_study.figure import draw
from posterior_study.methods import METHODS
from posterior_study.page import PAGE, filled
from posterior_study.plan import DOCUMENTS, MEMBERS, SEEDS, TRAINING_STEPS, VALIDATION, Sizes, steps
from posterior_study.results import Study
from stepwise.command import Script, dtype_of, parser, serve

from lm_eval_lora_ensemble.errors import EnsembleError


def _parser() -> argparse.ArgumentParser:
    found = parser(__doc__, seeds=SEEDS, page=PAGE)
    documents = ",".join(f"{task}={n}" for task, n in DOCUMENTS.items())
    found.add_argument(
        "--documents", default=documents, help="TASK=D,…, the in-domain one first (default: %(default)s)"
    )
    found.add_argument(
        "--members",
        default=",".join(map(str, MEMBERS)),
        help="N,…: all seeds have the first, the first seed the others too (default: %(default)s)",
    )
    found.add_argument("--methods", default=",".join(METHODS), help="(default: %(default)s)")
    found.add_argument("--steps", type=int, default=TRAINING_STEPS, help="of training (default: %(default)s)")
    found.add_argument(
        "--validation",
        type=int,
        default=VALIDATION,
        help="documents for the temperature (default: %(default)s)",
    )
    return found


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """Read the sizes.

    Raises:
        EnsembleError: something that is no size.
    """
    try:
        pairs = [pair.split("=") for pair in arguments.documents.split(",")]
        documents = {task: int(number) for task, number in pairs}
        members = tuple(map(int, arguments.members.split(",")))
    except ValueError:
        raise EnsembleError("give --documents TASK=D,TASK=D and --members N,N") from None
    methods = tuple(arguments.methods.split(","))
    return Sizes(
        documents,
        arguments.seeds,
        members,
        methods,
        arguments.steps,
        arguments.validation,
        dtype_of(arguments),
    )


if __name__ == "__main__":
    serve(
        Script(PAGE, sizes_of, lambda dtype: Sizes(dtype=dtype), steps, Study, filled, draw),
        _parser().parse_args(),
    )
