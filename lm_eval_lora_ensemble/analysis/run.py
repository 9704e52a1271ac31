"""One lm-eval run as arrays: its tasks' scores, the distribution they are judged by, and what it knows of its model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lm_eval_lora_ensemble.analysis.answers import AnswerScores
from lm_eval_lora_ensemble.analysis.distribution import Distribution, scale_of_run
from lm_eval_lora_ensemble.analysis.strings import StringScores
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.choice_scores import ChoiceScores
from lm_eval_lora_ensemble.metrics.predictions import Predictions


class NothingToAnalyseError(EnsembleError):
    """A run of whose tasks none has anything that an analysis could read, or judge."""


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
        protocols: the version and the number of examples in the context of each task, as far as they are known.
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
    protocols: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Name the run; its arrays would fill a notebook."""
        scored = [*self.tasks, *self.strings, *self.answers]
        return f"Run({self.source!r}, {self.date!r}, tasks={scored}, groups={list(self.groups)})"

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
        if isinstance(given, str):  # of simple_evaluate, and of older releases' command (seen in 0.4.4)
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
                groups = {**other.groups, **run.groups}
                skipped = {**other.skipped, **run.skipped}
                merged[i] = replace(
                    other,
                    source=f"{other.source}, {run.source}",
                    tasks={**other.tasks, **run.tasks},
                    groups=groups,
                    # what one of them lacks tasks of, the other may have whole
                    skipped={name: why for name, why in skipped.items() if name not in groups},
                    files={**other.files, **run.files},
                    seconds=_sum(other.seconds, run.seconds),
                    scores={**other.scores, **run.scores},
                    strings={**other.strings, **run.strings},
                    answers={**other.answers, **run.answers},
                    scored_groups={**other.scored_groups, **run.scored_groups},
                    task_configs={**other.task_configs, **run.task_configs},
                    protocols={**other.protocols, **run.protocols},
                )
                break
        else:
            merged.append(run)
    return merged


def _calibrated_anew(one: Run, other: Run) -> bool:
    """Whether both runs have temperatures from validation, and other ones."""
    found = [(run.config.get("lora_ensemble") or {}).get("calibration") for run in (one, other)]
    return None not in found and found[0] != found[1]


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def other_protocols(a: Run, b: Run, name: str) -> str:
    """Say by what two runs asked the tasks of ``name`` differently; empty where they did not, as far as is known."""
    differ = {
        f"{key} {_or_unknown(one.get(key))} and {_or_unknown(other.get(key))}"
        for leaf in a.leaves(name)
        if (one := a.protocols.get(leaf)) and (other := b.protocols.get(leaf))
        for key in one
        if one.get(key) != other.get(key)
    }
    return f"{name} was not asked alike: {'; '.join(sorted(differ))}" if differ else ""


def _or_unknown(value: object) -> str:
    return "unknown" if value is None else str(value)
