"""``lora-ensemble train RECIPE.yaml key=value …``: the command-line side of training."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME as MANIFEST
from lm_eval_lora_ensemble.train import recipe as recipes
from lm_eval_lora_ensemble.train.folder import begun
from lm_eval_lora_ensemble.train.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="recipe file, or the name of a bundled recipe; an unfinished ensemble's own recipe.yaml goes on with it",
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="recipe keys to change, for example members=3"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--member",
        metavar="I",
        type=int,
        help="train member I only (from 0), for job arrays; the last one to finish writes ensemble.json",
    )
    part.add_argument(
        "--complete",
        action="store_true",
        help="train nothing: write ensemble.json where every member is done, for members trained apart",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train the recipe's members; return 0."""
    recipe = _recipe(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lm_eval_lora_ensemble").setLevel(logging.INFO)
    from lm_eval_lora_ensemble.train.run import complete, train_members

    if arguments.complete:
        print(f"{complete(recipe) / MANIFEST} describes all {recipe.members} members")
        return 0
    folder = train_members(recipe, arguments.member)
    if (folder / MANIFEST).is_file():
        tasks = ",".join(recipe.task)
        print(f"Trained {recipe.members} member{'s' if recipe.members > 1 else ''} in {folder}")
        print(f"Evaluate: lm_eval --model lora-ensemble --model_args adapters={folder} --tasks {tasks}")
    else:
        print(f"Trained this process's members in {folder}; others are still to come")
    return 0


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """Load the recipe; that of an unfinished ensemble stands for the folder it lies in, which may have been moved."""
    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    path = Path(arguments.recipe)
    named = any(word.partition("=")[0].strip() == "output" for word in arguments.overrides)
    if named or path.name != recipes.FILE_NAME or not begun(path.parent):
        return recipe
    if (path.parent / MANIFEST).is_file() and not arguments.complete:
        return recipe  # a finished one is an example to train by again
    return replace(recipe, output=str(path.parent))
