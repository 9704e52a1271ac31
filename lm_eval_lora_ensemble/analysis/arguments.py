"""The command-line arguments of every verb that judges saved samples, and the settings they make."""

from __future__ import annotations

import argparse
from dataclasses import fields

from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.metrics.calibration import DEFAULT_BINS


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Declare what :func:`settings_of` reads, and ``--ood``."""
    parser.add_argument(
        "--ood",
        action="append",
        default=[],
        metavar="TASK",
        help="a task or group that is out-of-domain: tell it from the others by each uncertainty; repeatable",
    )
    parser.add_argument(
        "--bins", type=int, default=DEFAULT_BINS, help="calibration bins (default %(default)s)"
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, help="bootstrap resamples (default %(default)s)"
    )
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of resampling and splits (default %(default)s)")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings, with the defaults of those that the verb does not ask for."""
    asked = vars(arguments)
    return Settings(**{field.name: asked[field.name] for field in fields(Settings) if field.name in asked})
