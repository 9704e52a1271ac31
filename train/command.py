"""``lora-ensemble train RECIPE.yaml key=value …``: the command-line side of training."""

from __future__ import annotations

import argparse
import logging

from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME as MANIFEST
from lm_eval_lora_ensemble.train.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file, or the name of a bundled recipe")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="recipe keys to change, for example members=3"
    )
    parser.add_argument(
        "--member",
        metavar="I",
        type=int,
        help="train member I only (from 0), for job arrays; the last one to finish writes ensemble.json",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train the recipe's members; return 0."""
    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lm_eval_lora_ensemble").setLevel(logging.INFO)
    from lm_eval_lora_ensemble.train.run import train_members

    folder = train_members(recipe, arguments.member)
    if (folder / MANIFEST).is_file():
        tasks = ",".join(recipe.task)
        print(f"Trained {recipe.members} members in {folder}")
        print(f"Evaluate: lm_eval --model lora-ensemble --model_args adapters={folder} --tasks {tasks}")
    else:
        print(f"Trained this process's members in {folder}; others are still to come")
    return 0
