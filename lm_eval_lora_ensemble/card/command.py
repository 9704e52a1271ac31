"""``lora-ensemble card ENSEMBLE RESULTS…``: an ensemble's README.md for the Hub, and its members'."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_eval_lora_ensemble.analysis.arguments import add_evaluation, asked_distribution, settings_of
from lm_eval_lora_ensemble.ensemble.adapters.folder import link_root
from lm_eval_lora_ensemble.ensemble.hub import at_hand
from lm_eval_lora_ensemble.errors import EnsembleError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("ensemble", help="an ensemble folder, a folder of adapters, or an ensemble's Hub id")
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS", help="lm_eval's output folders or results_*.json"
    )
    parser.add_argument(
        "--output", type=Path, help="folder to write the cards to (default: the ensemble's own)"
    )
    parser.add_argument(
        "--name", help="what the ensemble is called (default: its repository's or folder's name)"
    )
    parser.add_argument("--repository", metavar="ORG/NAME", help="where on the Hub the folder will be")
    parser.add_argument(
        "--base-model", metavar="ORG/NAME", help="the base on the Hub, if adapters name a folder"
    )
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="ORG/NAME", help="trained on; repeatable"
    )
    parser.add_argument("--license", help="of the adapters, by the Hub's identifier, such as apache-2.0")
    parser.add_argument("--force", action="store_true", help="also replace a README.md that somebody wrote")
    add_evaluation(parser, primary=True)


def run(arguments: argparse.Namespace) -> int:
    """Read, compute, write, and say how to upload; return 0.

    Raises:
        EnsembleError: no such ensemble, results of another one, or a README.md that is a person's.
    """
    from lm_eval_lora_ensemble.card import build
    from lm_eval_lora_ensemble.card.subject import require_hub_id

    for option in ("repository", "base_model"):
        if value := getattr(arguments, option):
            require_hub_id(value, f"--{option.replace('_', '-')}")
    for value in arguments.dataset:
        require_hub_id(value, "--dataset")
    given = Path(arguments.ensemble).expanduser()
    on_hub = not given.is_dir()
    folder = Path(str(at_hand(arguments.ensemble))).expanduser()
    output = (arguments.output or folder).expanduser()
    if link_root(output.resolve()) != output.resolve():
        raise EnsembleError(
            f"{arguments.ensemble} is in the Hub's cache, where nothing is written; name a folder for the cards with "
            "--output, and upload that"
        )
    repository = arguments.repository or (arguments.ensemble.partition("@")[0] if on_hub else None)
    options = build.Options(
        name=arguments.name,
        repository=repository,
        base_model=arguments.base_model,
        datasets=tuple(arguments.dataset),
        license=arguments.license,
        settings=settings_of(arguments),
        distribution=asked_distribution(arguments),
    )
    written = build.write_cards(folder, arguments.results, output, options, force=arguments.force)
    for note in written.notes:
        print(note)
    print(f"Cards: {written.card}, and of {written.members} member{'s' if written.members > 1 else ''}")
    print(f"Upload: hf upload {repository or 'ORG/NAME'} {output}")
    return 0
