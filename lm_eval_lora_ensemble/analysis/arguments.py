"""The command-line arguments of every verb that judges saved samples, and the settings they make."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from lm_eval_lora_ensemble.analysis.distribution import RAW, VALIDATION, Distribution
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.run import Run, merge_runs
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.calibration import DEFAULT_BINS
from lm_eval_lora_ensemble.metrics.choice_scores import SCORE_KINDS


def add_settings(parser: argparse.ArgumentParser, *, primary: bool = False) -> None:
    """Declare ``--ood``, and what :func:`add_evaluation` declares."""
    parser.add_argument(
        "--ood",
        action="append",
        default=[],
        metavar="TASK",
        help="a task or group that is out-of-domain: tell it from the others by each uncertainty; repeatable",
    )
    add_evaluation(parser, primary=primary)


def add_evaluation(parser: argparse.ArgumentParser, *, primary: bool = False) -> None:
    """Declare what :func:`settings_of` and :func:`asked_distribution` read.

    Args:
        parser: of a verb.
        primary: the verb judges by :func:`primary_distribution` unless told otherwise.
    """
    by_default = "the default, unless every run has a T from validation: then chars and that T"
    parser.add_argument(
        "--scores",
        choices=SCORE_KINDS,
        help="what a choice's loglikelihood is divided by before the softmax: sum (nothing, "
        f"{by_default if primary else 'the default'}) or its length",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        help=f"of the softmax: 1 (the default{' with --scores' if primary else ''}), validation (fitted by training or "
        "`calibrate`), crossfit (an oracle), or a task of the run that it is fitted on",
    )
    parser.add_argument(
        "--bins", type=int, default=DEFAULT_BINS, help="calibration bins (default %(default)s)"
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, help="bootstrap resamples (default %(default)s)"
    )
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of resampling and splits (default %(default)s)")


def add_replicates(parser: argparse.ArgumentParser) -> None:
    """Declare ``--replicates``."""
    parser.add_argument(
        "--replicates",
        action="append",
        nargs="+",
        type=Path,
        default=[],
        metavar="RESULTS",
        help="results of ensembles that differ in their seeds only, read if they are not among RESULTS; repeatable, "
        "one set each time (sets whose results files say so are found without it)",
    )


def read_runs(arguments: argparse.Namespace) -> list[Run]:
    """Return the runs of RESULTS and of ``--replicates``, each once.

    Raises:
        EnsembleError: nothing was named, or files that cannot be trusted.
    """
    places = [*arguments.results, *(place for places in arguments.replicates for place in places)]
    if not places:
        raise EnsembleError("name a results folder, or several with --replicates")
    runs: dict[frozenset[Path], Run] = {}
    for run in (run for place in places for run in load_runs(place)):
        files = frozenset(Path(file).resolve() for file in run.files.values())
        if not files or not any(files <= known for known in runs):
            # a samples file that was named before its run is a part of it
            runs = {known: other for known, other in runs.items() if not known < files}
            runs[files or frozenset({Path(run.source)})] = run
    return merge_runs(list(runs.values()))


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings, with the defaults of those that the verb does not ask for."""
    asked = vars(arguments)
    return Settings(**{field.name: asked[field.name] for field in fields(Settings) if field.name in asked})


def asked_distribution(arguments: argparse.Namespace) -> Distribution | None:
    """Return the distribution that was asked for, None if nothing was said of it."""
    if arguments.scores is None and arguments.temperature is None:
        return None
    return Distribution(arguments.scores or "sum", arguments.temperature or RAW)


def under(runs: Sequence[Run], distribution: Distribution | None) -> list[Run]:
    """Return the runs judged by a distribution; as they are, summed at T = 1, for None."""
    return list(runs) if distribution is None else [run.under(distribution) for run in runs]


def primary_distribution(runs: Sequence[Run]) -> Distribution | None:
    """Return what a leaderboard judges unless told otherwise: scores per character on the scale from validation.

    None, which is summed scores at T = 1, where some run has no such scale.
    """
    primary = Distribution("chars", VALIDATION)
    try:
        judged = [run.under(primary) for run in runs]
    except EnsembleError:
        return None
    whole = all(one.tasks.keys() == run.tasks.keys() for one, run in zip(judged, runs, strict=True))
    return primary if whole else None
