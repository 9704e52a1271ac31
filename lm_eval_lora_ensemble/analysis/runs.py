"""lm-eval's results folder as arrays: what every analysis after a run starts from.

``samples_{task}_{date}.jsonl`` holds a line a document, read by :mod:`.samples`; ``results_{date}.json`` the
run's configuration and its groups.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.analysis.answers import AnswerScores
from lm_eval_lora_ensemble.analysis.distribution import Distribution, scale_of_run
from lm_eval_lora_ensemble.analysis.samples import read_task
from lm_eval_lora_ensemble.analysis.strings import StringScores
from lm_eval_lora_ensemble.disk import NOT_TO_READ
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores
from lm_eval_lora_ensemble.metrics.predictions import Predictions

_DATE = r"(?P<date>\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?)"
_SAMPLES = re.compile(rf"samples_(?P<task>.+)_{_DATE}\.jsonl")
_RESULTS = re.compile(rf".*_{_DATE}\.json")

logger = logging.getLogger(__name__)


class NothingToAnalyseError(EnsembleError):
    """A run of whose tasks none has anything that an analysis could read."""


@dataclass(frozen=True, eq=False)
class Run:
    """One lm-eval run: its model, its tasks' predictions, and which tasks form groups.

    Attributes:
        source: the folder or file it was read from.
        date: lm-eval's date id, empty if the file was renamed.
        config: ``config`` of the results file; empty without one.
        tasks: predictions by task name, under ``distribution``.
        groups: the tasks each group pools, sub-groups resolved, by group name; groups some of whose tasks
            have no samples are in ``skipped``.
        skipped: why a task or group is left out, by name.
        files: the samples file of each task.
        seconds: what the evaluation took, where lm-eval recorded it.
        scores: the members' scores by task name, which the predictions follow from.
        distribution: which distribution over the choices is judged.
        strings: tasks of whole strings by name, which are in ``skipped`` too: they have no choices.
        answers: tasks of generated texts by name, which are in ``skipped`` too.
        as_read: the run under the scores as they are; None where this is it.
        scored_groups: as ``groups``, those included of which some task has no distribution; empty where none has.
        task_configs: lm-eval's configuration of each task, as far as the results file has it.
    """

    source: str
    date: str
    config: Mapping[str, Any]
    tasks: Mapping[str, Predictions]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    scores: Mapping[str, ChoiceScores] = field(default_factory=dict)
    distribution: Distribution = field(default_factory=Distribution)
    strings: Mapping[str, StringScores] = field(default_factory=dict)
    answers: Mapping[str, AnswerScores] = field(default_factory=dict)
    as_read: Run | None = None
    scored_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    task_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def under(self, distribution: Distribution) -> Run:
        """Return the same run with its tasks judged by another distribution; what has none is in ``skipped``.

        Raises:
            EnsembleError: the scale is not defined for any task.

        Example:
            >>> from lm_eval_lora_ensemble import load_runs
            >>> from lm_eval_lora_ensemble.analysis.distribution import Distribution
            >>> (run,) = load_runs("results")
            >>> per_character = run.under(Distribution("chars"))
            >>> bool((per_character.predictions("plain_a").confidence < run.predictions("plain_a").confidence).all())
            True
        """
        if self.as_read is not None:  # what had no scale under this distribution may have one under another
            return self.as_read.under(distribution)
        shared = scale_of_run(distribution, self.scores, self.config, self.n_members)
        tasks, undefined = {}, {}
        for name, scores in self.scores.items():
            try:
                tasks[name] = distribution.of(scores, shared)
            except EnsembleError as error:  # noqa: PERF203 - one task without a scale must not hide the others
                undefined[name] = str(error)
        if undefined and not tasks:
            raise EnsembleError(f"{self.source}: {next(iter(undefined.values()))}")
        groups = {
            name: leaves for name, leaves in self.groups.items() if all(leaf in tasks for leaf in leaves)
        }
        for name in self.groups.keys() - groups.keys():
            undefined[name] = next(undefined[leaf] for leaf in self.groups[name] if leaf in undefined)
        skipped = {**self.skipped, **undefined}
        return replace(
            self,
            tasks=tasks,
            groups=groups,
            skipped=skipped,
            distribution=distribution,
            scored_groups=self.groups,
            as_read=self,
        )

    @cached_property
    def identity(self) -> str:
        """What tells this model from others: fingerprint, or model and arguments; "" where those are not kept.

        lm-eval keeps no arguments of a model that Python gave it ready-made, and its name is the base model's then.
        """
        ensemble = self.config.get("lora_ensemble")
        if isinstance(ensemble, Mapping) and "fingerprint" in ensemble:
            # the prior has no adapters, so its fingerprint does not tell whose epoch 0 it is
            of = self.series if self.epoch == 0 else ""
            return json.dumps([*(ensemble.get(key) for key in ("fingerprint", "base_model", "epoch")), of])
        if "model" not in self.config or not self.arguments:
            return ""
        said = {name: str(value) for name, value in self.arguments.items()}
        return json.dumps([self.config["model"], said], sort_keys=True)

    @cached_property
    def arguments(self) -> Mapping[str, Any]:
        """The model's arguments, as a mapping also where one string was kept of them; empty if unknown."""
        given = self.config.get("model_args")
        if isinstance(given, str):  # of simple_evaluate, and of older releases' command
            return dict(word.split("=", 1) for word in given.split(",") if "=" in word)
        return given if isinstance(given, Mapping) else {}

    @property
    def epoch(self) -> int | None:
        """The members' epoch, 0 for the prior; None for final adapters and for other models."""
        ensemble = self.config.get("lora_ensemble")
        epoch = ensemble.get("epoch") if isinstance(ensemble, Mapping) else None
        return epoch if isinstance(epoch, int) else None

    @property
    def series(self) -> str:
        """What the epochs of one ensemble share: its ``adapters`` argument; "" if unknown."""
        return str(self.arguments.get("adapters", ""))

    @property
    def n_members(self) -> int:
        """N, the same for all tasks."""
        scored: list[Predictions | StringScores | AnswerScores] = [
            *self.tasks.values(),
            *self.strings.values(),
            *self.answers.values(),
        ]
        return scored[0].n_members

    def __contains__(self, name: str) -> bool:
        """Whether ``name`` is a task or a group of this run."""
        return name in self.tasks or name in self.groups

    def names(self) -> list[str]:
        """Return groups and tasks, those first that are in no other group."""
        top = self.top_level()
        return top + [name for name in (*self.groups, *self.tasks) if name not in top]

    def top_level(self, *, besides: Sequence[str] = ()) -> list[str]:
        """Return the groups and tasks whose documents no other group holds as well.

        Args:
            besides: groups and tasks to leave out, with every group and task that shares documents with them.

        Raises:
            EnsembleError: one of ``besides`` is neither a task nor a group of this run.
        """
        if not besides:
            return list(self._top_level)
        without = {leaf for name in besides for leaf in self.leaves(name)}
        return _outermost(
            {
                name: own
                for name in (*self.groups, *self.tasks)
                if not without & (own := set(self.leaves(name)))
            }
        )

    @cached_property
    def _top_level(self) -> list[str]:
        return _outermost({name: set(self.leaves(name)) for name in (*self.groups, *self.tasks)})

    def leaves(self, name: str) -> tuple[str, ...]:
        """Return the tasks that ``name`` stands for.

        Raises:
            EnsembleError: neither a task nor a group of this run.
        """
        if name in self.tasks:
            return (name,)
        if name in self.groups:
            return self.groups[name]
        reason = f" ({self.skipped[name]})" if name in self.skipped else ""
        raise EnsembleError(
            f"{self.source} has no samples of {name!r}{reason}; "
            f"it has {', '.join([*self.groups, *self.tasks])}"
        )

    def scored_leaves(self, name: str) -> tuple[str, ...]:
        """Return the tasks that ``name`` stands for, also where the declared distribution has none for them.

        Raises:
            EnsembleError: the run has no scores of it.
        """
        if name in self.scores:
            return (name,)
        if name in self.scored_groups:
            return self.scored_groups[name]
        return self.leaves(name)

    def has_scores(self, name: str) -> bool:
        """Whether ``name`` is a task or a group whose members' scores are known, with or without a distribution."""
        return name in self or name in self.scores or name in self.scored_groups

    def predictions(self, name: str) -> Predictions:
        """Return a task's predictions, or a group's documents pooled.

        Raises:
            EnsembleError: neither a task nor a group of this run.
        """
        if name in self.tasks:
            return self.tasks[name]
        if name not in self._pooled:
            self._pooled[name] = Predictions.concatenate([self.tasks[leaf] for leaf in self.leaves(name)])
        return self._pooled[name]

    @cached_property
    def _pooled(self) -> dict[str, Predictions]:
        """The groups that were asked for."""
        return {}


def _outermost(leaves: Mapping[str, set[str]]) -> list[str]:
    """Return the names whose tasks no other name has as well; of equals the first."""
    names = list(leaves)
    return [
        name
        for i, name in enumerate(names)
        if not any(
            leaves[name] < leaves[other] or (leaves[name] == leaves[other] and j < i)
            for j, other in enumerate(names)
            if j != i
        )
    ]


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


def merge_runs(runs: Sequence[Run]) -> list[Run]:
    """Join runs of one model that evaluated different tasks, as one lm_eval call for each task leaves them.

    Runs whose model is unknown, that share a task, or whose temperatures from validation differ stay apart.
    """
    merged: list[Run] = []
    for run in runs:
        for i, other in enumerate(merged):
            known = run.identity and run.identity == other.identity
            theirs = {*other.tasks, *other.strings, *other.answers}
            apart = theirs & {*run.tasks, *run.strings, *run.answers} or _calibrated_anew(other, run)
            if known and not apart:
                merged[i] = replace(
                    other,
                    source=f"{other.source}, {run.source}",
                    tasks={**other.tasks, **run.tasks},
                    groups={**other.groups, **run.groups},
                    skipped={**other.skipped, **run.skipped},
                    files={**other.files, **run.files},
                    seconds=_sum(other.seconds, run.seconds),
                    scores={**other.scores, **run.scores},
                    strings={**other.strings, **run.strings},
                    answers={**other.answers, **run.answers},
                    scored_groups={**other.scored_groups, **run.scored_groups},
                    task_configs={**other.task_configs, **run.task_configs},
                )
                break
        else:
            merged.append(run)
    return merged


def _calibrated_anew(one: Run, other: Run) -> bool:
    """Whether both runs have temperatures from validation, and other ones."""
    found = [(run.config.get("lora_ensemble") or {}).get("calibration") for run in (one, other)]
    return None not in found and found[0] != found[1]


def _read_run(folder: Path, date: str, files: Mapping[str, Path], asked: Path) -> Run:
    results = _results_beside(folder, date)
    configs = _task_configs(results)
    scores: dict[str, ChoiceScores] = {}
    strings: dict[str, StringScores] = {}
    answers: dict[str, AnswerScores] = {}
    skipped: dict[str, str] = {}
    for task, file in sorted(files.items()):
        read = read_task(
            file,
            task,
            of_ensemble="lora_ensemble" in (results.get("config") or {}),
            own_scoring=bool(configs.get(task, {}).get("process_results")),
        )
        if isinstance(read, str):
            skipped[task] = read
        elif isinstance(read, StringScores):
            strings[task] = read
            skipped[task] = (
                "its documents are whole strings without choices; lora-ensemble analyse has its values"
            )
        elif isinstance(read, AnswerScores):
            answers[task] = read
            skipped[task] = "its documents are generated texts without choices; they have tables of their own"
        else:
            scores[task] = read
    if not scores and not strings and not answers:
        task, reason = next(iter(skipped.items()))
        raise NothingToAnalyseError(
            f"{folder}, {date or 'undated'}: no task can be analysed: {task}: {reason}"
        )
    every: dict[str, ChoiceScores | StringScores | AnswerScores] = {**scores, **strings, **answers}
    sizes = {task: of_task.n_members for task, of_task in every.items()}
    if len(set(sizes.values())) > 1:
        raise EnsembleError(
            f"{folder}: tasks of one run have different numbers of members ({sizes}); "
            "samples files of two ensembles were mixed"
        )
    groups, partial = _groups(results.get("group_subtasks") or {}, set(scores))
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
        strings=strings,
        answers=answers,
        task_configs=configs,
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


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


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
    subtasks: Mapping[str, Sequence[str]], tasks: set[str]
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
        else:
            partial[group] = f"{len(missing)} of its {len(names)} tasks have no usable samples"
    return complete, partial
