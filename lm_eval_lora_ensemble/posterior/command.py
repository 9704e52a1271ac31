"""``lora-ensemble draw METHOD SOURCE key=value …``: one adapter in, a posterior out."""

from __future__ import annotations

import argparse
import logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "method",
        metavar="METHOD",
        help="dropout, swag, … ; docs/draw.md has them all, and an unknown name lists them",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="an ensemble folder, one adapter folder, a Hub id, or a training run with kept snapshots",
    )
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        help="draws=10, seed=0, output=drawn, member=I or draws_per_member=D of an ensemble, and the method's options",
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw, and say how to evaluate what was drawn; return 0.

    Raises:
        EnsembleError: see :func:`.draw.draw`.
    """
    from lm_eval_lora_ensemble.ensemble.manifest import Manifest
    from lm_eval_lora_ensemble.posterior.draw import draw
    from lm_eval_lora_ensemble.posterior.options import split_words

    # a search says its path while it walks it
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lm_eval_lora_ensemble").setLevel(logging.INFO)
    folder = draw(arguments.method, arguments.source, **split_words(arguments.settings))
    drawn = Manifest.read(folder)
    assert drawn.method is not None
    count = len(drawn.members)
    print(f"Drew {count} member{'s' if count > 1 else ''} by {drawn.method.described()} in {folder}")
    print(f"Evaluate: lm_eval --model lora-ensemble --model_args adapters={folder} --tasks TASK")
    return 0
