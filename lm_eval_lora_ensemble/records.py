"""lm-eval's results folder as arrays: what every analysis after a run starts from.

``samples_{task}_{date}.jsonl`` holds a line a document, ``results_{date}.json`` the run's configuration and
its groups. Runs of this backend carry every member's loglikelihoods in ``members``; any other model's run
with ``--log_samples`` is an ensemble of one. Files are read line by line and only numbers are kept.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.uncertainty.arrays import FloatArray
from lm_eval_lora_ensemble.uncertainty.predictions import Predictions

_DATE = r"(?P<date>\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?)"
_SAMPLES = re.compile(rf"samples_(?P<task>.+)_{_DATE}\.jsonl")
_RESULTS = re.compile(rf".*_{_DATE}\.json")

_NLL_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Run:
    """One lm-eval run: its model, its tasks' predictions, and which tasks form groups.

    Attributes:
        source: the folder or file it was read from.
        date: lm-eval's date id, empty if the file was renamed.
        config: ``config`` of the results file; empty without one.
        tasks: predictions by task name.
        groups: the tasks each group pools, sub-groups resolved, by group name; groups some of whose tasks
            have no samples are in ``skipped``.
        skipped: why a task or group is left out, by name.
    """

    source: str
    date: str
    config: Mapping[str, Any]
    tasks: Mapping[str, Predictions]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def identity(self) -> str:
        """What tells this model from others: fingerprint, or model and arguments; "" if unknown."""
        ensemble = self.config.get("lora_ensemble")
        if isinstance(ensemble, Mapping) and "fingerprint" in ensemble:
            return json.dumps([ensemble.get(key) for key in ("fingerprint", "base_model", "epoch")])
        if "model" not in self.config:
            return ""
        return json.dumps([self.config.get(key) for key in ("model", "model_args")], sort_keys=True)

    @property
    def n_members(self) -> int:
        """N, the same for all tasks."""
        return next(iter(self.tasks.values())).n_members

    def names(self) -> list[str]:
        """Return groups and tasks, those first that are in no other group."""
        return self.top_level() + [n for n in (*self.groups, *self.tasks) if n not in self.top_level()]

    def top_level(self) -> list[str]:
        """Return the groups and tasks whose documents no other group holds as well."""
        names = [*self.groups, *self.tasks]
        leaves = {name: set(self.leaves(name)) for name in names}
        return [
            name
            for i, name in enumerate(names)
            if not any(
                leaves[name] < leaves[other] or (leaves[name] == leaves[other] and j < i)
                for j, other in enumerate(names)
                if j != i
            )
        ]

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

    def predictions(self, name: str) -> Predictions:
        """Return a task's predictions, or a group's documents pooled.

        Raises:
            EnsembleError: neither a task nor a group of this run.
        """
        leaves = self.leaves(name)
        return (
            self.tasks[name]
            if name in self.tasks
            else Predictions.concatenate([self.tasks[t] for t in leaves])
        )


def iter_samples(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, sample)`` of a samples file with all that lm-eval logged, texts included.

    Raises:
        EnsembleError: unreadable, or a line that is no JSON object.
    """
    try:
        with Path(path).open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    sample = json.loads(line)
                except ValueError as error:
                    raise EnsembleError(
                        f"{path}, line {number}: not JSON ({error}); "
                        "the file is cut off or damaged, run again"
                    ) from error
                if not isinstance(sample, dict):
                    raise EnsembleError(f"{path}, line {number}: not a sample of lm-eval")
                yield number, sample
    except (OSError, UnicodeDecodeError) as error:
        raise EnsembleError(f"{path} cannot be read ({error})") from error


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
    """Read every run below ``path``, oldest first; arguments and errors as :func:`load_samples`."""
    place = Path(path)
    if place.is_dir():
        files = sorted(place.rglob("samples_*.jsonl"))
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
    return [_read_run(folder, date, tasks, place) for (folder, date), tasks in ordered]


def merge_runs(runs: Sequence[Run]) -> list[Run]:
    """Join runs of one model that evaluated different tasks, as one lm_eval call for each task leaves them.

    Runs whose model is unknown, or that share a task, stay apart.
    """
    merged: list[Run] = []
    for run in runs:
        for i, other in enumerate(merged):
            known = run.identity and run.identity == other.identity
            if known and not set(run.tasks) & set(other.tasks):
                merged[i] = Run(
                    source=f"{other.source}, {run.source}",
                    date=other.date,
                    config=other.config,
                    tasks={**other.tasks, **run.tasks},
                    groups={**other.groups, **run.groups},
                    skipped={**other.skipped, **run.skipped},
                )
                break
        else:
            merged.append(run)
    return merged


def _read_run(folder: Path, date: str, files: Mapping[str, Path], asked: Path) -> Run:
    results = _results_beside(folder, date)
    tasks: dict[str, Predictions] = {}
    skipped: dict[str, str] = {}
    for task, file in sorted(files.items()):
        read = _read_task(file, task, of_ensemble="lora_ensemble" in (results.get("config") or {}))
        if isinstance(read, str):
            skipped[task] = read
        else:
            tasks[task] = read
    if not tasks:
        raise EnsembleError(f"{asked}: no task can be analysed: {next(iter(skipped.items()), '')}")
    sizes = {task: p.n_members for task, p in tasks.items()}
    if len(set(sizes.values())) > 1:
        raise EnsembleError(
            f"{folder}: tasks of one run have different numbers of members ({sizes}); "
            "samples files of two ensembles were mixed"
        )
    groups, partial = _groups(results.get("group_subtasks") or {}, set(tasks))
    if len(files) > 1:
        skipped.update(partial)
    config = results.get("config")
    source = str(asked if asked.is_file() else folder)
    return Run(source, date, config if isinstance(config, dict) else {}, tasks, groups, skipped)


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


# ------------------------------------------------------------------------------------------- one task


@dataclass
class _Row:
    """The numbers of one document."""

    key: tuple[int, str]
    scores: FloatArray
    gold: int
    why_no_gold: str
    nll: float
    line: int


def _read_task(path: Path, task: str, *, of_ensemble: bool) -> Predictions | str:
    """Read a samples file; return why it cannot be analysed if it is not of a multiple-choice task.

    In an ensemble's run a task whose samples carry no members' scores is not taken for a single model's.
    """
    rows: dict[int, _Row] = {}
    wanted: str | None = None
    for number, sample in iter_samples(path):
        # Several filters log every document several times; the first one is the task's main one.
        wanted = sample.get("filter", "none") if wanted is None else wanted
        if sample.get("filter", "none") != wanted:
            continue
        if of_ensemble and "members" not in sample:
            return "its samples carry no members' scores: several gold answers, or uncertainty_metrics=False"
        scores = _scores(sample, f"{path}, line {number}")
        if isinstance(scores, str):
            return scores
        row = _row(sample, scores, number, path)
        if row.key[0] in rows:
            raise EnsembleError(
                f"{path}, line {number}: document {row.key[0]} occurs twice; "
                "two runs were written to one file"
            )
        if rows and len(scores) != (n := len(next(iter(rows.values())).scores)):
            raise EnsembleError(
                f"{path}, line {number}: {len(scores)} members, {n} before; "
                "samples of two ensembles were mixed"
            )
        rows[row.key[0]] = row
    if not rows:
        raise EnsembleError(f"{path} holds no sample")
    # Ranks of a distributed run write their documents one rank after another.
    return _assemble([rows[key] for key in sorted(rows)], task, path)


def _scores(sample: Mapping[str, Any], place: str) -> FloatArray | str:
    """Return the loglikelihoods (N, C) of a sample, or why it has none."""
    values: Any = sample.get("members")
    if values is None:
        single = _single_model_scores(sample)
        if single is None:
            return "not a multiple-choice task: its samples hold no loglikelihood for each choice"
        values = [single]
    try:
        scores = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EnsembleError(
            f"{place}: members is not a table of numbers, members by choices ({error})"
        ) from error
    if scores.ndim != 2 or not len(scores):
        raise EnsembleError(f"{place}: members has shape {scores.shape}; members by choices is needed")
    if scores.shape[1] < 2:
        return f"its documents have {scores.shape[1]} choice; at least two are needed"
    if np.isnan(scores).any() or (scores == np.inf).any():
        raise EnsembleError(
            f"{place}: a loglikelihood is NaN or infinite; score again in float32 or bfloat16"
        )
    if np.isneginf(scores).all(axis=1).any():
        raise EnsembleError(f"{place}: every choice has loglikelihood -inf; no distribution follows")
    return scores


def _single_model_scores(sample: Mapping[str, Any]) -> list[float] | None:
    """Return a plain model's loglikelihoods, which lm-eval writes as pairs of strings."""
    responses = sample.get("filtered_resps")
    try:
        pairs = [(float(value), greedy) for value, greedy in responses]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        return None
    if not all(str(greedy) in ("True", "False") for _, greedy in pairs):
        return None
    values = [value for value, _ in pairs]
    half = len(values) // 2
    contexts = [argument.get("arg_0") for argument in _arguments(sample)]
    # The metric acc_mutual_info scores every choice a second time, without its question.
    if (
        len(contexts) == len(values) == 2 * half
        and "" not in contexts[:half]
        and set(contexts[half:]) == {""}
    ):
        return values[:half]
    return values


def _arguments(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the requests' arguments in order of the choices."""
    arguments = sample.get("arguments")
    if not isinstance(arguments, Mapping):
        return []
    return [arguments[key] for key in sorted(arguments, key=lambda k: int(k.rsplit("_", 1)[-1]))]


def _row(sample: Mapping[str, Any], scores: FloatArray, number: int, path: Path) -> _Row:
    try:
        document = int(sample["doc_id"])
        nll = sample.get("nll")
        gold, why = _gold(sample, scores)
        return _Row(
            key=(document, str(sample.get("doc_hash", ""))[:16]),
            scores=scores,
            gold=gold,
            why_no_gold="" if gold >= 0 else f"{path}, line {number}: {why}",
            nll=float("nan") if nll is None else float(nll),
            line=number,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnsembleError(
            f"{path}, line {number}: not a sample of lm-eval ({type(error).__name__}: {error})"
        ) from error


def _gold(sample: Mapping[str, Any], scores: FloatArray) -> tuple[int, str]:
    """Return the gold choice's index, or −1 and why it is unknown.

    ``target`` is what the task's doc_to_target gave, as a string: an index, or a choice's text. Where the
    contexts vary and the continuation does not, it is neither; then the logged scores have to tell.
    """
    target, c = str(sample.get("target", "")).strip(), scores.shape[1]
    texts = [str(argument.get("arg_1", "")).strip() for argument in _arguments(sample)][:c]
    if target.startswith("["):
        try:
            listed = ast.literal_eval(target)
        except (ValueError, SyntaxError):
            listed = None
        if isinstance(listed, list) and len(listed) != 1:
            return -1, f"{len(listed)} gold answers; these metrics are defined for one"
        target = str(listed[0]) if isinstance(listed, list) else target
    gold = -1
    if re.fullmatch(r"\d+", target) and int(target) < c:
        gold = int(target)
    elif texts.count(target) == 1:
        gold = texts.index(target)
    elif len(set(texts)) < len(texts):
        gold = _gold_from_scores(sample, scores)
    if gold < 0:
        return -1, f"target {target[:40]!r} is neither an index nor one of the {c} choices"
    acc, chosen = sample.get("acc"), _chosen(sample, c)
    if acc in (0, 1) and chosen >= 0 and (chosen == gold) != bool(acc):
        return -1, f"target says choice {gold} is right, acc says otherwise; the task has its own scoring"
    return gold, ""


def _chosen(sample: Mapping[str, Any], c: int) -> int:
    """Return the choice that lm-eval's acc looked at, or −1."""
    values = _single_model_scores(sample)
    return int(np.argmax(values)) if values is not None and len(values) == c else -1


def _gold_from_scores(sample: Mapping[str, Any], scores: FloatArray) -> int:
    """Find the only choice that the logged nll or acc allow, or −1."""
    c = scores.shape[1]
    if sample.get("nll") is not None:
        losses = -Predictions.from_scores(scores[:, None, :], None).log_mixture[0]
        matches = np.flatnonzero(np.abs(losses - float(sample["nll"])) <= _NLL_TOLERANCE)
        return int(matches[0]) if len(matches) == 1 else -1
    chosen = _chosen(sample, c)
    if chosen >= 0 and sample.get("acc") == 1:
        return chosen
    return 1 - chosen if chosen >= 0 and c == 2 and sample.get("acc") == 0 else -1


def _assemble(rows: Sequence[_Row], task: str, path: Path) -> Predictions:
    """Pad the documents to one array and settle whether the class "other" belongs to them."""
    n, c = len(rows[0].scores), max(row.scores.shape[1] for row in rows)
    scores = np.full((n, len(rows), c), -np.inf)
    for d, row in enumerate(rows):
        scores[:, d, : row.scores.shape[1]] = row.scores
    without = [row.why_no_gold for row in rows if row.gold < 0]
    golds = None if without else np.array([row.gold for row in rows])

    def build(*, other_class: bool) -> Predictions:
        return Predictions.from_scores(
            scores,
            golds,
            counts=[row.scores.shape[1] for row in rows],
            subjects=task,
            documents=[f"{document}:{digest}" for document, digest in (row.key for row in rows)],
            other_class=other_class,
            missing_gold=without[0] if without else "",
        )

    logged = np.array([row.nll for row in rows])
    predictions = build(other_class=False)
    off = _disagrees(predictions, logged)
    if not off.any():
        return predictions
    try:
        with_other = build(other_class=True)
    except EnsembleError:
        with_other = None
    if with_other is not None and not _disagrees(with_other, logged).any():
        return with_other
    raise EnsembleError(
        f"{path}, line {rows[int(np.argmax(off))].line}: the logged nll does not follow from the scores; "
        "the file was edited or put together from two runs"
    )


def _disagrees(predictions: Predictions, logged: FloatArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return where the nll that was logged (NaN: none was) is not that of the predictions."""
    if predictions.gold is None:
        return np.zeros(len(logged), dtype=np.bool_)
    nll = -predictions.log_mixture[np.arange(len(logged)), predictions.gold]
    same = np.isclose(nll, logged, rtol=_NLL_TOLERANCE, atol=_NLL_TOLERANCE)
    return ~(same | np.isnan(logged))
