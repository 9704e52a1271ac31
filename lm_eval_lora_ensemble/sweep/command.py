"""``lora-ensemble sweep``: how accuracy, calibration and disagreement move from the prior to overfitting."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lm_eval_lora_ensemble.errors import EnsembleError, Interrupted
from lm_eval_lora_ensemble.harness.arguments import add_scoring_arguments, parse_model_args
from lm_eval_lora_ensemble.sweep.plan import SweepPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("ensemble", type=Path, help="an ensemble folder with kept epochs")
    parser.add_argument("--tasks", required=True, metavar="A,B", help="in-domain lm-eval tasks or groups")
    parser.add_argument("--ood", default="", metavar="A,B", help="out-of-domain tasks or groups")
    parser.add_argument(
        "--epochs", help="0..5 or 0,2,4; 0 is the base model alone (default: 0 and all that are kept)"
    )
    parser.add_argument("--members", type=int, help="use only the first N members")
    parser.add_argument("--output", type=Path, default=Path("sweep"), help="folder to write (default: sweep)")
    parser.add_argument("--limit", type=float, help="only the first N documents (or this share) of each task")
    add_scoring_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate every epoch that is not there yet and say how to see them.

    Raises:
        EnsembleError: unknown epochs or tasks, or an output folder of another sweep.
    """
    tasks, ood = _names(arguments.tasks), _names(arguments.ood)
    if not tasks:
        raise EnsembleError("--tasks names no task")
    both = sorted(set(tasks) & set(ood))
    if both:
        raise EnsembleError(f"{', '.join(both)} cannot be both in --tasks and in --ood")
    if arguments.limit is not None and not arguments.limit > 0:
        raise EnsembleError(f"--limit {arguments.limit:g}: give a number above 0")
    plan = SweepPlan(
        adapters=str(arguments.ensemble),
        tasks=(*tasks, *ood),
        ood=ood,
        members=arguments.members,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        model_args=parse_model_args(arguments.model_args),
    )
    ensembles = plan.ensembles(arguments.epochs)

    # the plugin must be known to lm-eval before its task manager is made
    from lm_eval_lora_ensemble._autoload import install

    install(even_if_disabled=True)
    from lm_eval_lora_ensemble.sweep.run import sweep

    # accelerate and torchrun number their processes there; one of them speaks
    speaks = int(os.environ.get("RANK", "0")) == 0
    try:
        for epoch, folder in sweep(
            plan,
            ensembles,
            arguments.output,
            device=arguments.device,
            batch_size=arguments.batch_size,
            include_path=arguments.include_path,
        ):
            if speaks:
                print(f"epoch {epoch}: {folder}", flush=True)
    except KeyboardInterrupt:
        raise Interrupted(
            f"finished epochs and the scores of the one under way are kept in {arguments.output}; "
            "the same command goes on from there"
        ) from None
    if speaks:
        flags = "".join(f" --ood {task}" for task in ood)
        print(f"To see them: lora-ensemble report {arguments.output}{flags}")
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
