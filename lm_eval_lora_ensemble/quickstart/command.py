"""``lora-ensemble quickstart``: from nothing to a trained, evaluated ensemble in minutes.

A real small language model from the package index, five members trained on questions about countries, and
lm-eval's own command on countries it was not trained on and on countries that do not exist.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from lm_eval_lora_ensemble.disk import refuse_file
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.report.command import require_libraries

TASKS = ("quickstart_countries", "quickstart_invented")
_FOLDERS = ("ensemble", "results", "report")
_KIND = {"quickstart_countries": "in-domain", "quickstart_invented": "out-of-domain"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder to write (default: quickstart)"
    )
    parser.add_argument("--members", type=int, help="number of members (default: the recipe's five)")


def run(arguments: argparse.Namespace) -> int:
    """Train, evaluate, print the table and say where everything is; return 0."""
    require_libraries()  # before minutes of work, not after
    console, start, output = Console(), time.monotonic(), arguments.output
    ensemble, results, report = (output / name for name in _FOLDERS)
    _refuse_another(output)
    console.print("[bold]1/3[/] training members on questions about countries")
    _train(ensemble, arguments.members)
    trained = time.monotonic()
    console.print(f"[bold]2/3[/] evaluating with lm_eval on {' and '.join(TASKS)}")
    _evaluate(ensemble, results)
    evaluated = time.monotonic()
    console.print("[bold]3/3[/] reading the results\n")
    page = _report(console, results, report)
    console.print(
        f"Trained in {trained - start:.0f} s, evaluated in {evaluated - trained:.0f} s. The ensemble is in "
        f"{ensemble}, lm-eval's files are in {results}.\nThe report, with figures and every question: {page}",
        soft_wrap=True,
    )
    return 0


def _refuse_another(output: Path) -> None:
    """Refuse a folder in which there is anything that no quickstart wrote."""
    refuse_file(output, f"--output {output}")
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    others = [name for name in names if name not in _FOLDERS and not name.startswith(".")]
    if others:
        raise EnsembleError(
            f"--output {output} holds {others[0]}, which no quickstart wrote; name a new folder"
        )


def _train(ensemble: Path, members: int | None) -> None:
    from lm_eval_lora_ensemble.train.recipe import Recipe
    from lm_eval_lora_ensemble.train.run import train_members

    changes = [f"output={ensemble}"] + ([] if members is None else [f"members={members}"])
    train_members(Recipe.load("quickstart", changes))


def _evaluate(ensemble: Path, results: Path) -> None:
    """Run lm-eval's command in a process of its own, so that nothing of training is still in memory."""
    from lm_eval_lora_ensemble.precision import fast_dtype

    dtype = str(fast_dtype(_device())).removeprefix("torch.")
    # with the plugin's start-up file switched off, the same command line is reached through the package
    module = "lm_eval_lora_ensemble" if os.environ.get("LM_EVAL_LORA_ENSEMBLE_AUTOLOAD") == "0" else "lm_eval"
    command = [sys.executable, "-m", module, "run", "--model", "lora-ensemble"]
    command += ["--model_args", f"adapters={ensemble},dtype={dtype}", "--tasks", ",".join(TASKS)]
    command += ["--batch_size", "auto", "--log_samples", "--output_path", str(results)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EnsembleError(f"lm_eval ended with status {done.returncode}; what it said is above")
    print(done.stdout)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _report(console: Console, results: Path, report: Path) -> Path:
    from lm_eval_lora_ensemble.analysis.runs import load_runs
    from lm_eval_lora_ensemble.quickstart.summary import summarise, to_rich
    from lm_eval_lora_ensemble.report.build import make_report, write_report
    from lm_eval_lora_ensemble.report.model import Options

    # a results folder grows with every run; the newest is this one
    newest = max(load_runs(results), key=lambda run: run.date)
    for task in TASKS:
        predictions = newest.predictions(task)
        title = f"{task}: {_KIND[task]}, {predictions.n_documents} questions"
        console.print(to_rich(title, summarise(predictions)))
    inside, outside = TASKS
    options = Options(title=f"Quickstart: trained on {inside}, asked about {outside}", ood=(outside,))
    return write_report(make_report([newest], options), report)
