"""The command ``lora-ensemble``: a table of verbs, each of which lives with its subject.

A verb's module offers ``add_arguments(parser)`` and ``run(arguments) -> int``; it is imported only when
its verb is given, so that ``lora-ensemble --help`` does not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from lm_eval_lora_ensemble.errors import (
    EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    EnsembleError,
    error_line,
    interruption_line,
)

VERBS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "lm_eval_lora_ensemble.quickstart.command",
        "train and evaluate a small ensemble from nothing, in minutes",
    ),
    "train": ("lm_eval_lora_ensemble.train.command", "train the members of an ensemble from a recipe"),
    "draw": (
        "lm_eval_lora_ensemble.posterior.command",
        "draw the members of an ensemble from what one has: an adapter, or a run's snapshots",
    ),
    "check": (
        "lm_eval_lora_ensemble.ensemble.check",
        "verify that every member of an ensemble is what it claims to be",
    ),
    "calibrate": (
        "lm_eval_lora_ensemble.harness.calibrate",
        "fit the scale of an ensemble's probabilities on a validation or training split",
    ),
    "convert": (
        "lm_eval_lora_ensemble.ensemble.convert",
        "write adapters that were saved as pickles (adapter_model.bin) as safetensors",
    ),
    "sweep": (
        "lm_eval_lora_ensemble.sweep.command",
        "evaluate every epoch of an ensemble, the prior included",
    ),
    "analyse": (
        "lm_eval_lora_ensemble.analysis.command",
        "compute every metric, with intervals, from lm-eval's saved samples",
    ),
    "report": (
        "lm_eval_lora_ensemble.report.command",
        "write a page, tables and figures from lm-eval's results folders",
    ),
    "card": (
        "lm_eval_lora_ensemble.card.command",
        "write an ensemble's README.md for the Hub, with its results and their intervals",
    ),
}

ALIASES = {"uncertainty": "analyse"}
"""Verbs of 0.1 under the names they have now; they go with the release after this one."""


def _parser(verb: str | None) -> argparse.ArgumentParser:
    """Build the parser; only ``verb``'s own arguments are loaded."""
    parser = argparse.ArgumentParser(
        prog="lora-ensemble",
        description="Train LoRA ensembles and judge their probabilities. "
        "To evaluate one: lm_eval --model lora-ensemble --model_args adapters=FOLDER --tasks TASK",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, summary) in VERBS.items():
        child = verbs.add_parser(name, help=summary, description=summary)
        if name == verb:
            importlib.import_module(module).add_arguments(child)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, or 2 after one line that says what is wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv[:1] = [ALIASES.get(word, word) for word in argv[:1]]
    verb = next((word for word in argv if word in VERBS), None)
    arguments = _parser(verb).parse_args(argv)
    try:
        return int(importlib.import_module(VERBS[arguments.verb][0]).run(arguments))
    except EnsembleError as error:
        print(error_line(error), file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:
        # the reader of our output went away, as `| head` does; what Python flushes at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        print(interruption_line(stop), file=sys.stderr)
        return INTERRUPTED_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
