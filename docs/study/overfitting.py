"""The study of docs/study.md, from base model to tables: ``python docs/study/overfitting.py --output FOLDER``.

Trains ensembles on a hundred questions of ARC-Easy until they overfit, without and with the paper's penalty, evaluates
them and the prior by epoch with lm_eval, and fills the tables of the page, in FOLDER/study.md. Every step is run once:
stop it at any time, the same command goes on where it was. It needs the benchmarks from the Hub.

    python docs/study/overfitting.py --output study --plan         # what would be run, and for how long
    python docs/study/overfitting.py --output study --seeds 1      # the first of the replicates
    python docs/study/overfitting.py --output study --publish      # all, and docs/study.md itself
"""

from __future__ import annotations

import argparse

from overfitting_study.figure import draw
from overfitting_study.page import PAGE, filled
from overfitting_study.plan import SEEDS, Sizes, steps
from overfitting_study.results import Study
from stepwise.command import Script, dtype_of, parser, serve


def _parser() -> argparse.ArgumentParser:
    found = parser(__doc__, seeds=SEEDS, page=PAGE)
    found.add_argument("--share", type=float, default=1.0, help="of every number of documents, for a trial")
    return found


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """Read the sizes.

    Raises:
        EnsembleError: something that is no size.
    """
    return Sizes.of_share(arguments.seeds, arguments.share, dtype_of(arguments))


if __name__ == "__main__":
    serve(
        Script(PAGE, sizes_of, lambda dtype: Sizes(dtype=dtype), steps, Study, filled, draw),
        _parser().parse_args(),
    )
