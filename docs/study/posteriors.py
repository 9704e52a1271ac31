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
import sys
from pathlib import Path

import torch
from posterior_study.figure import draw
from posterior_study.methods import METHODS
from posterior_study.page import PAGE, filled
from posterior_study.plan import DOCUMENTS, MEMBERS, SEEDS, TRAINING_STEPS, VALIDATION, Sizes, steps
from posterior_study.results import Study
from posterior_study.running import estimate, in_words, read_records, run

from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.disk import write_text
from lm_eval_lora_ensemble.errors import (
    EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    EnsembleError,
    error_line,
    interruption_line,
)
from lm_eval_lora_ensemble.precision import fast_dtype


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of everything")
    documents = ",".join(f"{task}={n}" for task, n in DOCUMENTS.items())
    parser.add_argument(
        "--documents", default=documents, help="TASK=D,…, the in-domain one first (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="replicates (default: %(default)s)")
    parser.add_argument(
        "--members",
        default=",".join(map(str, MEMBERS)),
        help="N,…: all seeds have the first, the first seed the others too (default: %(default)s)",
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="(default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=TRAINING_STEPS, help="of training (default: %(default)s)"
    )
    parser.add_argument(
        "--validation",
        type=int,
        default=VALIDATION,
        help="documents for the temperature (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", default="auto", help="of the base; auto is bfloat16 where it is fast, else float32"
    )
    parser.add_argument("--plan", action="store_true", help="print the steps and their time, run nothing")
    parser.add_argument(
        "--tables", action="store_true", help="write the tables of what is there, run nothing"
    )
    parser.add_argument(
        "--publish", action="store_true", help=f"write the tables into {PAGE.name} of docs/ too"
    )
    return parser


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
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = str(fast_dtype("cuda" if torch.cuda.is_available() else "cpu")).removeprefix("torch.")
    methods = tuple(arguments.methods.split(","))
    return Sizes(documents, arguments.seeds, members, methods, arguments.steps, arguments.validation, dtype)


def _plan(sizes: Sizes, output: Path) -> None:
    every = steps(sizes)
    left = estimate(every, read_records(every, output))
    for step in every:
        print(f"{in_words(left[step.name]) if step.name in left else 'done':>8}  {step.name}")
    print(f"{len(left)} of {len(every)} steps are left, about {in_words(sum(left.values()))}")


def _write(sizes: Sizes, output: Path, *, publish: bool) -> None:
    every = steps(sizes)
    study = Study(sizes, output, read_records(every, output), Settings())
    page = filled(PAGE.read_text(encoding="utf-8"), study)
    for folder in [output, *([PAGE.parent] if publish else [])]:
        draw(study, folder)
        write_text(folder / PAGE.name, page)
        print(f"Tables: {folder / PAGE.name}")


def main(arguments: argparse.Namespace) -> None:
    """Plan, run or write.

    Raises:
        EnsembleError: sizes that are none, a step that failed, or results of other settings.
    """
    sizes, output = sizes_of(arguments), arguments.output.expanduser().absolute()
    if arguments.publish and sizes.is_trial:
        raise EnsembleError(f"--publish: a trial says nothing; {PAGE.name} has results of full size only")
    if arguments.plan:
        _plan(sizes, output)
        return
    output.mkdir(parents=True, exist_ok=True)
    if not arguments.tables:
        run(steps(sizes), output)
    _write(sizes, output, publish=arguments.publish)


if __name__ == "__main__":
    try:
        main(_parser().parse_args())
    except EnsembleError as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        print(interruption_line("what is done is kept; the same command goes on"), file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)
