"""The command of a study: plan, run what is left, write tables; shared by the scripts beside this folder."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.disk import refuse_file, write_text
from lm_eval_lora_ensemble.errors import (
    EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    EnsembleError,
    error_line,
    interruption_line,
)
from lm_eval_lora_ensemble.precision import fast_dtype
from stepwise.archive import beside, pack, unpack
from stepwise.running import Record, Step, estimate, in_words, read_records, run
from stepwise.study import S, StudyFolder

T = TypeVar("T", bound=StudyFolder[Any])


@dataclass(frozen=True)
class Script(Generic[S, T]):
    """One study's own part.

    Attributes:
        page: of docs/, that ``--publish`` writes.
        sizes: from the arguments; raises EnsembleError for what is no size.
        published: the sizes of the page, from the base's dtype.
        steps: all of them, in order.
        study: from sizes, folder, records and settings.
        filled: the page's text with the tables of a study.
        draw: the page's figure into a folder.
    """

    page: Path
    sizes: Callable[[argparse.Namespace], S]
    published: Callable[[str], S]
    steps: Callable[[S], Sequence[Step]]
    study: Callable[[S, Path, Mapping[str, Record], Settings], T]
    filled: Callable[[str, T], str]
    draw: Callable[[T, Path], None]


def parser(description: str | None, *, seeds: int, page: Path) -> argparse.ArgumentParser:
    """Return what every study's command takes."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of everything")
    found.add_argument("--seeds", type=int, default=seeds, help="replicates (default: %(default)s)")
    found.add_argument(
        "--dtype", default="auto", help="of the base; auto is bfloat16 where it is fast, else float32"
    )
    found.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="steps at a time, each with its share of the threads (default: %(default)s)",
    )
    found.add_argument("--plan", action="store_true", help="print the steps and their time, run nothing")
    found.add_argument("--tables", action="store_true", help="write the tables of what is there, run nothing")
    found.add_argument(
        "--publish",
        action="store_true",
        help=f"write the tables into {page.name} of docs/ too, and the numbers beside it",
    )
    return found


def dtype_of(arguments: argparse.Namespace) -> str:
    """Return the dtype's name; ``auto`` is what the hardware multiplies fast."""
    if arguments.dtype != "auto":
        return str(arguments.dtype)
    return str(fast_dtype("cuda" if torch.cuda.is_available() else "cpu")).removeprefix("torch.")


def main(script: Script[S, T], arguments: argparse.Namespace) -> None:
    """Plan, run or write.

    Raises:
        EnsembleError: sizes that are none, a step that failed, or results of other settings.
    """
    sizes, output = script.sizes(arguments), arguments.output.expanduser().absolute()
    if arguments.publish and sizes != script.published(sizes.dtype):
        raise EnsembleError(
            f"--publish: {script.page.name} has results of the default sizes, as far as they are done; give no other"
        )
    refuse_file(output, f"--output {output}")
    if arguments.jobs < 1:
        raise EnsembleError(f"--jobs {arguments.jobs}: give at least one step at a time")
    if arguments.jobs > 1 and torch.cuda.is_available():
        raise EnsembleError("--jobs: steps that share a GPU say nothing of what each costs; give 1")
    every = script.steps(sizes)
    if arguments.plan:
        _plan(every, output, arguments.jobs)
        return
    output.mkdir(parents=True, exist_ok=True)
    if not arguments.tables:
        run(every, output, arguments.jobs)
    records = read_records(every, output)
    if arguments.publish and not records:
        raise EnsembleError(f"--publish: nothing is done in {output}")
    _write(script, sizes, every, output, output)
    if arguments.publish:
        archive = beside(script.page)
        pack(output, records, archive)
        print(f"Numbers: {archive}")
        with tempfile.TemporaryDirectory() as folder:  # a page says what its archive gives, to the last digit
            unpack(archive, Path(folder))
            _write(script, sizes, every, Path(folder), script.page.parent)


def _write(script: Script[S, T], sizes: S, every: Sequence[Step], output: Path, place: Path) -> None:
    """Write the tables and the figure of a study's folder into another."""
    study = script.study(sizes, output, read_records(every, output), Settings())
    text = script.filled(script.page.read_text(encoding="utf-8"), study)
    script.draw(study, place)
    write_text(place / script.page.name, text)
    print(f"Tables: {place / script.page.name}")


def serve(script: Script[S, T], arguments: argparse.Namespace) -> None:
    """Run :func:`main` as a command: what goes wrong is one line and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends its steps too
    try:
        main(script, arguments)
    except EnsembleError as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        print(interruption_line("what is done is kept; the same command goes on"), file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)


def _plan(every: Sequence[Step], output: Path, jobs: int) -> None:
    left = estimate(every, read_records(every, output))
    for step in every:
        print(f"{in_words(left[step.name]) if step.name in left else 'done':>8}  {step.name}")
    print(f"{len(left)} of {len(every)} steps are left, about {in_words(sum(left.values()) / jobs)}")
