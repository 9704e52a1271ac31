"""lm-eval's results folder as arrays: what every analysis after a run starts from.

``samples_{task}_{date}.jsonl`` holds a line a document, read by :mod:`.samples`; ``results_{date}.json`` the
run's configuration and its groups.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.analysis.answers import AnswerScores
from lm_eval_lora_ensemble.analysis.run import NothingToAnalyseError, Run
from lm_eval_lora_ensemble.analysis.samples import read_task
from lm_eval_lora_ensemble.analysis.strings import StringScores
from lm_eval_lora_ensemble.disk import NOT_TO_READ
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores

_DATE = r"(?P<date>\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?)"
_SAMPLES = re.compile(rf"samples_(?P<task>.+)_{_DATE}\.jsonl")
_RESULTS = re.compile(rf".*_{_DATE}\.json")

logger = logging.getLogger(__name__)


def load_samples(path: Path | str) -> Run:
    """Read one run from a samples file, a results_*.json or a folder.

    Args:
        path: ``samples_{task}_{date}.jsonl`` for one task, ``results_{date}.json`` for all tasks of a run,
            or a folder, searched with its sub-folders.

    Raises:
        EnsembleError: nothing there, several runs in the folder (:func:`load_runs` reads them all), or a
            file that cannot be trusted.
    """
    runs = load_runs(path)
    if len(runs) > 1:
        raise EnsembleError(
            f"{path} holds {len(runs)} runs; name the results_*.json of one: "
            + ", ".join(f"{run.source} ({run.date})" for run in runs)
        )
    return runs[0]


def load_runs(path: Path | str) -> list[Run]:
    """Read every run below ``path``, oldest first.

    Args:
        path: lm-eval's output folder, searched with its sub-folders; a ``results_*.json`` for all tasks of one run;
            or a ``samples_*.jsonl`` for one task.

    Returns:
        The runs, at least one. What is in no run's ``tasks`` is in its ``skipped``, with the reason.

    Raises:
        EnsembleError: nothing there, or a file that cannot be trusted.

    Example:
        >>> from lm_eval_lora_ensemble import load_runs
        >>> for run in load_runs("results"):
        ...     print(run.n_members, "members on", ", ".join(run.top_level()))
        2 members on both, varies_context
        >>> run.predictions("both").mixture.shape
        (30, 4)
    """
    place = Path(path)
    if place.is_dir():
        every = sorted(place.rglob("samples_*.jsonl"))
        files = [file for file in every if not NOT_TO_READ & set(file.relative_to(place).parts)]
    elif place.suffix == ".jsonl" and place.is_file():
        files = [place]
    elif place.suffix == ".json" and place.is_file():
        found = _RESULTS.fullmatch(place.name)
        files = sorted(place.parent.glob(f"samples_*_{found['date']}.jsonl")) if found else []
    else:
        raise EnsembleError(f"{place} is neither a folder, a results_*.json nor a samples_*.jsonl")
    if not files:
        raise EnsembleError(
            f"{place} has no samples_*.jsonl; run lm_eval with --log_samples and --output_path"
        )
    runs: dict[tuple[Path, str], dict[str, Path]] = {}
    for file in files:
        found = _SAMPLES.fullmatch(file.name)
        task, date = (found["task"], found["date"]) if found else (file.stem.removeprefix("samples_"), "")
        runs.setdefault((file.parent, date), {})[task] = file
    if place.is_dir():
        _warn_of_results_alone(place, runs.keys())
    ordered = sorted(runs.items(), key=lambda item: (item[0][1], str(item[0][0])))
    read, useless = [], []
    for (folder, date), tasks in ordered:
        try:
            read.append(_read_run(folder, date, tasks, place))
        except NothingToAnalyseError as error:  # noqa: PERF203 - the others of the folder are judged all the same
            useless.append(error)
    if not read:
        raise useless[0]
    for reason in useless:
        logger.warning("left out: %s", reason)
    return read


def _warn_of_results_alone(place: Path, runs: Collection[tuple[Path, str]]) -> None:
    """Name the results files below a folder whose samples are not there: nothing of those runs is read."""
    for file in sorted(place.rglob("results_*.json")):
        found = _RESULTS.fullmatch(file.name)
        hidden = NOT_TO_READ & set(file.relative_to(place).parts)
        if found and not hidden and (file.parent, found["date"]) not in runs:
            logger.warning("left out: %s has no samples beside it; they take --log_samples", file)


Scores = ChoiceScores | StringScores | AnswerScores


def _read_run(folder: Path, date: str, files: Mapping[str, Path], asked: Path) -> Run:
    results = _results_beside(folder, date)
    every, skipped = _read_tasks(results, files)
    if not every:
        task, reason = next(iter(skipped.items()))
        raise NothingToAnalyseError(
            f"{folder}, {date or 'undated'}: no task can be analysed: {task}: {reason}"
        )
    sizes = {task: of_task.n_members for task, of_task in every.items()}
    if len(set(sizes.values())) > 1:
        raise EnsembleError(
            f"{folder}: tasks of one run have different numbers of members ({sizes}); "
            "samples files of two ensembles were mixed"
        )
    scores = {task: read for task, read in every.items() if isinstance(read, ChoiceScores)}
    groups, partial = _groups(results.get("group_subtasks") or {}, set(scores), every.keys() - scores.keys())
    if asked.suffix != ".jsonl":  # one samples file was asked for, not what is beside it
        skipped.update(partial)
    config = results.get("config")
    source = str(asked if asked.is_file() else folder)
    return Run(
        source,
        date,
        config if isinstance(config, dict) else {},
        {task: of_task.predictions() for task, of_task in scores.items()},
        groups,
        skipped,
        {task: str(files[task]) for task in every},
        _seconds(results),
        scores,
        strings={task: read for task, read in every.items() if isinstance(read, StringScores)},
        answers={task: read for task, read in every.items() if isinstance(read, AnswerScores)},
        task_configs=_task_configs(results),
        protocols={task: _protocol(results, task) for task in every},
    )


def _read_tasks(
    results: Mapping[str, Any], files: Mapping[str, Path]
) -> tuple[dict[str, Scores], dict[str, str]]:
    """Return what each samples file has, and why tasks are in no table of choices."""
    configs = _task_configs(results)
    every: dict[str, Scores] = {}
    skipped: dict[str, str] = {}
    for task, file in sorted(files.items()):
        directions = _of_task(results, "higher_is_better", task)
        read = read_task(
            file,
            task,
            of_ensemble="lora_ensemble" in (results.get("config") or {}),
            own_scoring=bool(configs.get(task, {}).get("process_results")),
            lower_is_better=[metric for metric, higher in directions.items() if not higher],
        )
        if isinstance(read, str):
            skipped[task] = read
            continue
        every[task] = read
        _warn_if_cut(results, task, file, read)
        if isinstance(read, StringScores):
            skipped[task] = (
                "its documents are whole strings without choices; lora-ensemble analyse has its values"
            )
        elif isinstance(read, AnswerScores):
            skipped[task] = "its documents are generated texts without choices; they have tables of their own"
    return every, skipped


def _of_task(results: Mapping[str, Any], key: str, task: str) -> dict[str, Any]:
    """Return a task's table under ``key`` of a results file; empty if there is none."""
    tables = results.get(key)
    table = tables.get(task) if isinstance(tables, dict) else None
    return table if isinstance(table, dict) else {}


def _protocol(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return how a task was asked, as far as a comparison has to know it."""
    tables = {"version": results.get("versions"), "few-shot examples": results.get("n-shot")}
    return {name: table.get(task) for name, table in tables.items() if isinstance(table, dict)}


def _warn_if_cut(results: Mapping[str, Any], task: str, file: Path, read: Scores) -> None:
    """Warn of a samples file with fewer documents than the results file says were evaluated.

    It is no error: older lm-eval (seen in 0.4.9) counts all documents where ``--samples`` has chosen some.
    """
    found = read.n_documents + (read.left_out if isinstance(read, AnswerScores) else 0)
    evaluated = _of_task(results, "n-samples", task).get("effective")
    if isinstance(evaluated, int) and found < evaluated:
        logger.warning(
            "%s has %d documents, and the results file says that %d were evaluated: unless --samples chose them, the "
            "file was cut; copy it again",
            file,
            found,
            evaluated,
        )


def _task_configs(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    configs = results.get("configs")
    found = configs.items() if isinstance(configs, dict) else ()
    return {name: config for name, config in found if isinstance(config, dict)}


def _seconds(results: Mapping[str, Any]) -> float | None:
    try:
        return float(results["total_evaluation_time_seconds"])
    except (KeyError, TypeError, ValueError):
        return None


def _results_beside(folder: Path, date: str) -> dict[str, Any]:
    """Return the results file of the same run, or nothing if it was not kept."""
    if not date:
        return {}
    for file in sorted(folder.glob(f"*_{date}.json")):
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EnsembleError(f"{file} is not a readable results file ({error})") from error
        if isinstance(results, dict) and "results" in results:
            return results
    return {}


def _groups(
    subtasks: Mapping[str, Sequence[str]], tasks: set[str], without_choices: set[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Resolve groups of groups to tasks; return the complete ones, and why others are left out."""

    def leaves(name: str) -> list[str]:
        below = subtasks.get(name) or []
        return [leaf for child in below for leaf in leaves(child)] if below else [name]

    complete: dict[str, tuple[str, ...]] = {}
    partial: dict[str, str] = {}
    for group in (name for name, below in subtasks.items() if below):
        names = tuple(dict.fromkeys(leaves(group)))
        missing = [name for name in names if name not in tasks]
        if not missing:
            complete[group] = names
        elif without_choices.issuperset(names):
            partial[group] = "its tasks have no choices; they have tables of their own"
        else:
            partial[group] = f"{len(missing)} of its {len(names)} tasks have no usable samples"
    return complete, partial
