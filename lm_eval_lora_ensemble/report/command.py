"""``lora-ensemble report``: a page, tables and figures from lm-eval's results folders."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from lm_eval_lora_ensemble.analysis.arguments import (
    add_replicates,
    add_settings,
    asked_distribution,
    primary_distribution,
    read_runs,
    settings_of,
    under,
)
from lm_eval_lora_ensemble.errors import EnsembleError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="RESULTS",
        help="lm_eval's output folders, results_*.json or samples_*.jsonl, of any number of runs and models",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report"), help="folder to write (default: report)"
    )
    parser.add_argument("--title", help="of the page")
    add_settings(parser, primary=True)
    add_replicates(parser)
    parser.add_argument(
        "--documents", type=int, default=3000, help="documents the page shows, about (default %(default)s)"
    )
    parser.add_argument("--figures", type=int, default=24, help="figures drawn at most (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Read, compute, write, and say where the page is.

    Raises:
        EnsembleError: nothing to report on, an unknown task, or an output folder that is something else.
    """
    require_libraries()
    for name in ("figures", "documents"):
        if getattr(arguments, name) < 0:
            raise EnsembleError(f"--{name} {getattr(arguments, name)}: give 0 or more")
    from rich.console import Console
    from rich.markup import escape

    from lm_eval_lora_ensemble.report.build import make_report, refuse_foreign, write_report
    from lm_eval_lora_ensemble.report.model import Options

    refuse_foreign(arguments.output)  # before the work, not after
    options = Options(
        ood=tuple(dict.fromkeys(arguments.ood)),
        settings=settings_of(arguments),
        documents=arguments.documents,
        figures=arguments.figures,
        replicates=tuple(map(tuple, arguments.replicates)),
        **({"title": arguments.title} if arguments.title else {}),
    )
    with Console(stderr=True).status("reading") as status:

        def tell(text: str) -> None:
            status.update(escape(text))

        runs = read_runs(arguments)
        runs = under(runs, asked_distribution(arguments) or primary_distribution(runs))
        page = write_report(make_report(runs, options, tell), arguments.output, tell)
    print(f"Report: {page}")
    return 0


def require_libraries() -> None:
    """Check that what only reports need is installed.

    Raises:
        EnsembleError: it is not.
    """
    for module in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(module) is None:
            raise EnsembleError(f"{module} is missing; from a checkout, pip install '.[report]'")
