"""The leaderboard: a cell for every run, row, task and metric, each with its interval and its samples file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lm_eval_lora_ensemble.analysis.evaluation import macro_mean
from lm_eval_lora_ensemble.analysis.replicates import student_interval, welch_interval
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.analysis.run import Run, other_protocols
from lm_eval_lora_ensemble.metrics.battery import Battery
from lm_eval_lora_ensemble.metrics.bootstrap import Bootstrapped, Estimate, ResamplingPlan, bootstrap, mean_of
from lm_eval_lora_ensemble.metrics.predictions import Predictions, same_documents
from lm_eval_lora_ensemble.metrics.registry import METRICS
from lm_eval_lora_ensemble.report.entries import Entry


class _Columns(Mapping[str, str]):
    """Reads the registry each time, so that a metric registered later has its column too."""

    def __getitem__(self, name: str) -> str:
        return {metric.name: metric.column for metric in METRICS.values() if metric.column}[name]

    def __iter__(self) -> Iterator[str]:
        return (metric.name for metric in METRICS.values() if metric.column)

    def __len__(self) -> int:
        return sum(1 for _ in self)


COLUMNS: Mapping[str, str] = _Columns()
"""The leaderboard's metrics, as the registry has them, and the heads of their columns."""

KINDS = ("replicates", "members of replicates", "ensemble", "model", "macro", "mean member", "best member")
"""The rows of a run, in the order they are shown; those of replicates stand before their first run's."""

# documents times resamples: above it, resamples become fewer, and the intervals' own limits a little rougher
_DRAWS = 20_000_000
_FEWEST_RESAMPLES = 200


@dataclass(frozen=True)
class Cell:
    """One number of the report.

    Attributes:
        value: NaN where the metric is undefined.
        display: as it is shown.
        standard_error: over the resamples.
        low, high: the interval's limits, NaN where there is none.
        interval: ``bca`` or ``basic`` over documents, or ``t`` over replicates.
        direction: ``higher`` or ``lower`` is better, or neither.
        unit: nats, or none.
        n: documents.
        resamples: R of the interval.
        source: the samples files it follows from.
        best: better than every other row of its task by an interval of the difference that excludes 0: paired over
            documents, or over replicates where both rows have some; never a member that was chosen in hindsight, nor
            one replicate where the mean of them all is there.
        replicates: that the value is the mean of; 0 for one run's own value.
    """

    value: float
    display: str
    standard_error: float
    low: float
    high: float
    interval: str
    direction: str
    unit: str
    n: int
    resamples: int
    source: tuple[str, ...]
    best: bool = False
    replicates: int = 0


@dataclass(frozen=True)
class Row:
    """One line of one task.

    Attributes:
        entry: index of the run.
        kind: ``ensemble``, ``model``, ``mean member``, ``best member`` (lowest nll, in hindsight), ``macro``
            (unweighted mean of the ensemble's values over a group's tasks), ``replicates`` (mean over ensembles of
            other seeds) or ``members of replicates`` (mean over all their members).
        label: as shown.
        cells: by metric.
    """

    entry: int
    kind: str
    label: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Board:
    """All rows of one task or group.

    Attributes:
        task: its name.
        tasks: the tasks it pools; itself for a task.
        top: whether no other group holds its documents.
        documents: (fewest, most) over the runs.
        rows: run by run.
        gains: by run, the ensemble minus its mean member, paired; for runs of several members, at the top.
        notes: what a reader must know, such as documents that differ between the runs.
    """

    task: str
    tasks: tuple[str, ...]
    top: bool
    documents: tuple[int, int]
    rows: list[Row]
    gains: dict[int, dict[str, Cell]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """A row before its cells are made: the resamples are what pairs it with others.

    ``parts`` are the replicates that it is the mean of, and ``replicate_set`` which set they are.
    """

    entry: int
    kind: str
    label: str
    drawn: Bootstrapped
    predictions: Predictions
    parts: tuple[Bootstrapped, ...] = ()
    replicate_set: int = -1


def leaderboard(
    entries: Sequence[Entry], settings: Settings, sets: Sequence[Sequence[int]] = ()
) -> Iterator[Board]:
    """Yield the board of every task and group, tasks before the groups that hold them.

    A task without gold answers in some run has no row for that run.

    Args:
        entries: the runs.
        settings: bins, resamples, seed, level.
        sets: indices of the entries that are replicates of each other.
    """
    names = list(dict.fromkeys(name for e in entries for name in (*e.run.tasks, *e.run.groups)))
    groups = {name for e in entries for name in e.run.groups}
    ensembles: dict[tuple[int, str], Bootstrapped] = {}
    for name in sorted(names, key=lambda name: (name in groups, names.index(name))):
        having = [(i, e) for i, e in enumerate(entries) if name in e.run]
        drawn = [row for i, entry in having for row in _draw(i, entry, name, settings)]
        if not drawn:
            continue
        drawn += [row for number, of in enumerate(sets) for row in _draw_replicates(number, of, drawn)]
        leaves = having[0][1].run.leaves(name)
        top = any(name in e.run.top_level() for _, e in having)
        ensembles |= {(row.entry, name): row.drawn for row in drawn if row.kind in ("ensemble", "model")}
        sizes = [row.predictions.n_documents for row in drawn]
        comparable = all(same_documents(drawn[0].predictions, row.predictions) for row in drawn)
        best = _best(drawn, sets, settings.level) if comparable and len(drawn) > 1 else {}
        rows = []
        for index, row in enumerate(drawn):
            sources = _sources(entries[row.entry], name)
            cells = {
                metric: replace(
                    _over_replicates(
                        make_cell(metric, row.drawn.estimate(metric), sizes[index], row.drawn, sources),
                        [part.value[metric] for part in row.parts],
                        settings.level,
                    ),
                    best=best.get(metric) == index,
                )
                for metric in COLUMNS
            }
            rows.append(Row(row.entry, row.kind, row.label, cells))
            if row.kind in ("ensemble", "model") and len(leaves) > 1:
                parts = [ensembles[row.entry, leaf] for leaf in leaves if (row.entry, leaf) in ensembles]
                rows.append(_macro_row(row, parts, sources, settings.level))
        yield Board(
            task=name,
            tasks=leaves,
            top=top,
            documents=(min(sizes), max(sizes)),
            rows=rows,
            gains=_gains(entries, name, drawn) if top else {},
            notes=_notes(name, [entry.run for _, entry in having], comparable=comparable),
        )


def _notes(name: str, runs: Sequence[Run], *, comparable: bool) -> list[str]:
    """Say what keeps the runs' rows from meaning the same."""
    notes = [] if comparable else [f"{name}: the runs answered different documents; no value is marked best"]
    asked = dict.fromkeys(other_protocols(runs[0], run, name) for run in runs[1:])
    return [*notes, *filter(None, asked)]


def _draw(index: int, entry: Entry, name: str, settings: Settings) -> list[_Drawn]:
    """Return the rows of one run on one task: the ensemble, its mean member and its best one."""
    predictions = entry.run.predictions(name)
    if predictions.is_gold is None:
        return []
    plan = report_plan(name, predictions, settings)

    def draw(of: Predictions) -> Bootstrapped:
        return bootstrap(Battery(of, settings.bins, COLUMNS), plan)

    n = predictions.n_members
    whole = draw(predictions)
    if n == 1:
        return [_Drawn(index, "model", entry.label, whole, predictions)]
    members = [draw(predictions.member(m)) for m in range(n)]
    best = int(np.argmin([member.value["nll"] for member in members]))
    return [
        _Drawn(index, "ensemble", entry.label, whole, predictions),
        _Drawn(index, "mean member", f"{entry.label}: mean member", mean_of(members), predictions),
        _Drawn(index, "best member", f"{entry.label}: member {best}, the best", members[best], predictions),
    ]


def _draw_replicates(number: int, indices: Sequence[int], drawn: Sequence[_Drawn]) -> list[_Drawn]:
    """Return the mean of a set's ensembles and that of their members, where all have them on the same documents."""
    rows = []
    for kind, of, words in (
        ("replicates", ("ensemble", "model"), "replicates"),
        ("members of replicates", ("mean member",), "replicates, their members"),
    ):
        found = [row for row in drawn if row.entry in indices and row.kind in of]
        alike = all(same_documents(found[0].predictions, row.predictions) for row in found)
        if len(found) == len(indices) and alike:
            parts = tuple(row.drawn for row in found)
            label = f"{found[0].label.removesuffix(': mean member')}: mean of {len(parts)} {words}"
            rows.append(
                _Drawn(found[0].entry, kind, label, mean_of(parts), found[0].predictions, parts, number)
            )
    return rows


def _over_replicates(cell: Cell, values: Sequence[float], level: float) -> Cell:
    """Give the cell of several replicates Student's interval over them."""
    if not values:
        return cell
    low, high = student_interval(np.array(values), level)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return replace(
        cell,
        low=low,
        high=high,
        standard_error=error,
        interval="" if math.isnan(low) else "t",
        replicates=len(values),
    )


def _gains(entries: Sequence[Entry], name: str, rows: Sequence[_Drawn]) -> dict[int, dict[str, Cell]]:
    """Return, for each run of several members, its ensemble minus its mean member."""
    kinds = {(row.entry, row.kind): row for row in rows}
    found = {}
    for (index, kind), row in kinds.items():
        if kind != "ensemble":
            continue
        difference = row.drawn.minus(kinds[index, "mean member"].drawn)
        n, sources = row.predictions.n_documents, _sources(entries[index], name)
        found[index] = {m: make_cell(m, difference.estimate(m), n, difference, sources) for m in COLUMNS}
    return found


def report_plan(name: str, predictions: Predictions, settings: Settings) -> ResamplingPlan:
    """Return how a report resamples a task: as the battery does, less often where documents are very many."""
    n = resamples_for(predictions.n_documents, settings.resamples)
    return settings.plan(name, predictions, resamples=n)


def resamples_for(documents: int, asked: int) -> int:
    """Return how many resamples so many documents get."""
    return min(asked, max(_FEWEST_RESAMPLES, _DRAWS // documents))


def _best(rows: Sequence[_Drawn], sets: Sequence[Sequence[int]], level: float) -> dict[str, int]:
    """Return the row that beats every other one, by metric, where there is one."""
    replicated = {index for row in rows if row.parts for index in sets[row.replicate_set]}
    # one replicate leads another by the luck of its seed: the mean of all stands for them
    contenders = [i for i, row in enumerate(rows) if row.parts or row.entry not in replicated]
    found = {}
    for metric in COLUMNS:
        sign = {"higher": 1.0, "lower": -1.0, "": math.nan}[METRICS[metric].direction]
        values = np.array([rows[i].drawn.value[metric] for i in contenders]) * sign
        if not np.isfinite(values).all():
            continue
        first = contenders[int(np.argmax(values))]
        # chosen on these very documents, so its lead is not one that other documents would show
        if rows[first].kind == "best member":
            continue
        others = [rows[i] for i in contenders if i != first]
        if all(_differs(rows[first], other, metric, level) for other in others):
            found[metric] = first
    return found


def _differs(a: _Drawn, b: _Drawn, metric: str, level: float) -> bool:
    """Whether the interval of a difference excludes 0: over replicates where both have some, else over documents."""
    if not a.parts or not b.parts:
        low, high, _ = a.drawn.minus(b.drawn).estimate(metric).quoted
        return low > 0 or high < 0
    first, second = (np.array([part.value[metric] for part in row.parts]) for row in (a, b))
    if a.replicate_set == b.replicate_set:  # ensembles and their own members
        low, high = student_interval(first - second, level)
    else:
        low, high = welch_interval(first, second, level)
    return low > 0 or high < 0


def _macro_row(row: _Drawn, parts: Sequence[Bootstrapped], sources: tuple[str, ...], level: float) -> Row:
    cells = {}
    for metric in COLUMNS:
        estimate, counted = macro_mean(metric, parts, level)
        cells[metric] = make_cell(metric, estimate, counted, parts[0], sources)
    return Row(row.entry, "macro", f"{row.label}: mean over {len(parts)} tasks (macro)", cells)


def _sources(entry: Entry, name: str) -> tuple[str, ...]:
    return tuple(entry.run.files[leaf] for leaf in entry.run.leaves(name) if leaf in entry.run.files)


def make_cell(metric: str, estimate: Estimate, n: int, drawn: Bootstrapped, sources: tuple[str, ...]) -> Cell:
    """Return an estimate of a metric as a cell."""
    low, high, kind = estimate.quoted
    meaning = METRICS[metric]
    return Cell(
        value=estimate.value,
        display=display(estimate.value),
        standard_error=estimate.standard_error,
        low=low,
        high=high,
        interval="" if math.isnan(low) else kind,
        direction=meaning.direction,
        unit=meaning.unit,
        n=n,
        resamples=len(drawn.resampled[metric]),
        source=sources,
    )


def display(value: float) -> str:
    """Show three decimals, without a leading zero for shares; – where undefined."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    # adding 0 turns a −0 left by rounding into 0
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")
