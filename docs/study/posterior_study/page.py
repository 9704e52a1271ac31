"""The tables of docs/posteriors.md: between its markers, from the results of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from stepwise.page import filled as fill
from stepwise.page import shown, table, time_and_machine
from stepwise.values import Judged, best

from lm_eval_lora_ensemble.errors import EnsembleError
from posterior_study.figure import NAME, tasks_drawn
from posterior_study.methods import DEEP, IN_DOMAIN, METHODS, POINT
from posterior_study.plan import steps
from posterior_study.results import AVERAGED, BESIDE, DETECTION, JUDGED, PRIMARY, Study, direction_of

PAGE = Path(__file__).resolve().parents[2] / "posteriors.md"

DIFFERENCES = ("accuracy", "nll", "ece", "brier_score", "error_auroc_entropy", DETECTION)
SCALES = ("accuracy", "nll", "ece")
HEADS = {
    "brier_score": "Brier",
    "mutual_information": "MI",
    "error_auroc_entropy": "AUROC of errors",
    DETECTION: "OOD AUROC of entropy",
}
_ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def filled(page: str, study: Study | None) -> str:
    """Return the page with every block between its markers as the results have it; None is no results."""

    def made(block: Callable[[Study], str]) -> Callable[[], str]:
        return lambda: block(study) if study else ""

    return fill(page, "posteriors", {"methods": methods, **{name: made(of) for name, of in BLOCKS.items()}})


def methods() -> str:
    """Return the table of the methods, which no result changes."""
    sources = {POINT: "the adapter of MAP", DEEP: "an ensemble of N", "ivon": "own run", "blob": "own run"}
    rows = [
        [f"`{method.name}`", method.title, sources[method.source] if method.is_drawn else "is trained"]
        for method in METHODS.values()
    ]
    return table(["method", "what it is here", "drawn from"], rows, numbers=False)


def what_was_run(study: Study) -> str:
    """Return sizes, machine and time, and for every method what there is of what was planned."""
    if not study.records:
        return ""
    every, sizes = steps(study.sizes), study.sizes
    documents = ", ".join(f"{task} {number}" for task, number in sizes.documents.items())
    lines = [
        *(["**A trial: its numbers say nothing.**", ""] if sizes.is_trial else []),
        f"* Documents: {documents}. Temperatures: {sizes.validation} documents of {IN_DOMAIN}'s validation split.",
        f"* Training: {sizes.training_steps} steps of four documents, {sizes.dtype}.",
        *time_and_machine(every, study.records),
        "",
    ]
    counts = list(dict.fromkeys(members for members, _ in sizes.columns()))
    rows = []
    for name in study.methods:
        cells = []
        for members in counts:
            seeds = study.seeds(members)
            whole = [s for s in seeds if all(s in study.done(members, name, t) for t in sizes.documents)]
            cells.append(f"{len(whole)} of {len(seeds)}" if whole else "not run yet")
        rows.append([f"`{name}`", *cells])
    return "\n".join(lines) + "\n" + table(["seeds evaluated", *(f"N = {n}" for n in counts)], rows)


def primary(study: Study) -> str:
    """Return every metric of every method, a table a task and number of members."""

    def of_task(members: int, task: str) -> str:
        judged = study.judge(members, task, PRIMARY)
        columns: dict[str, Mapping[str, Judged]] = dict.fromkeys(JUDGED, judged)
        if task != IN_DOMAIN and (detected := study.detect(members, task)):
            columns[DETECTION] = detected
        leaders = {m: best(of, m, direction_of(m)) for m, of in columns.items()}
        rows = [
            [f"`{name}`", *(_cell(of.get(name), m, bold=leaders[m] == name) for m, of in columns.items())]
            for name in judged
        ]
        return table(["", *map(_head, columns)], rows)

    return _by_task(study, of_task)


def figure(study: Study) -> str:
    """Return the figure's line, where there is something to draw."""
    if not tasks_drawn(study):
        return ""
    words = f"nll of each method minus that of one adapter, N = {study.sizes.members[0]}"
    return f"![{words}; filled where 0 is excluded]({NAME})\n"


def differences(study: Study) -> str:
    """Return every method minus MAP, paired; bold where the interval excludes 0."""

    def of_task(members: int, task: str) -> str:
        judged = study.judge(members, task, PRIMARY)
        detected = {} if task == IN_DOMAIN else study.detect(members, task)
        columns = [metric for metric in DIFFERENCES if metric != DETECTION or detected]
        rows = []
        for name in judged:
            if name == POINT or POINT not in judged:
                continue
            gains = {m: _minus(detected if m == DETECTION else judged, name) for m in columns}
            cells = [
                _cell(gain, m, bold=gain is not None and gain.value(m).excludes_zero)
                for m, gain in gains.items()
            ]
            rows.append([f"`{name}`", *cells])
        return table(["minus `map`", *map(_head, columns)], rows) if rows else ""

    return _by_task(study, of_task)


def averaging(study: Study) -> str:
    """Return every method minus its own mean member, paired; bold where the interval excludes 0."""

    def of_task(members: int, task: str) -> str:
        gains = study.averaging(members, task)
        rows = [
            [f"`{name}`", *(_cell(gain, m, bold=gain.value(m).excludes_zero) for m in AVERAGED)]
            for name, gain in gains.items()
        ]
        return table(["minus its mean member", *map(_head, AVERAGED)], rows) if rows else ""

    return _by_task(study, of_task)


def scales(study: Study) -> str:
    """Return accuracy, nll and ece under the two scales beside the primary one."""

    def of_task(members: int, task: str) -> str:
        by_scale: dict[str, dict[str, Judged]] = {}
        notes = []
        for distribution in BESIDE:
            try:
                by_scale[distribution.label] = study.judge(members, task, distribution)
            except EnsembleError as error:  # noqa: PERF203 - few documents give no oracle, and raw scores all the same
                reason = str(error).replace(f"{study.output}/", "")
                notes.append(f"Not defined here: {distribution.label} ({reason}).\n")
        head = [f"{label.split(', ')[0]}: {_head(metric)}" for label in by_scale for metric in SCALES]
        names = dict.fromkeys(name for judged in by_scale.values() for name in judged)
        rows = [
            [f"`{name}`", *(_cell(of.get(name), m) for of in by_scale.values() for m in SCALES)]
            for name in names
        ]
        return (table(["", *head], rows) if rows else "") + "".join(f"\n{note}" for note in notes)

    return _by_task(study, of_task)


def costs(study: Study) -> str:
    """Return the work of training, drawing and evaluation in multiples of MAP's, means over seeds."""
    text = []
    for members in dict.fromkeys(n for n, _ in study.sizes.columns()):
        rows = []
        for name in study.methods:
            shares: dict[str, list[float]] = {"training": [], "drawing": [], "evaluation": []}
            bound = dict.fromkeys(shares, "")
            for seed in study.seeds(members):
                took, unit = study.cost(members, name, seed), study.cost(members, POINT, seed)
                if took is None or unit is None:
                    continue
                for part, (seconds, interrupted) in took.items():
                    of, unsure = unit["training" if part == "drawing" else part]
                    shares[part].append(seconds / of)
                    bound[part] = "~" if interrupted or unsure else bound[part]
            if shares["training"]:
                cells = [f"{bound[part]}{sum(of) / len(of):.2f}" for part, of in shares.items()]
                rows.append([f"`{name}`", *cells, str(len(shares["training"]))])
        if rows:
            head = [f"N = {members}", "training", "drawing", "evaluation", "seeds"]
            text.append(table(head, rows))
    return "\n".join(text)


BLOCKS: Mapping[str, Callable[[Study], str]] = {
    "run": what_was_run,
    "primary": primary,
    "figure": figure,
    "differences": differences,
    "averaging": averaging,
    "scales": scales,
    "costs": costs,
}


def _by_task(study: Study, of_task: Callable[[int, str], str]) -> str:
    """Return a table for each number of members and task that has results, under its heading."""
    parts = []
    for members in dict.fromkeys(n for n, _ in study.sizes.columns()):
        for task, documents in study.sizes.documents.items():
            seeds = {len(study.done(members, name, task)) for name in study.methods} - {0}
            table = of_task(members, task) if seeds else ""
            if table:
                number = "–".join(map(str, sorted({min(seeds), max(seeds)})))
                heading = f"N = {members}, {task}, {documents} documents, {number} seed{'s' if number != '1' else ''}"
                parts.append(f"\n### {heading}\n\n{table}")
    return "".join(parts) + "\n" if parts else ""


def _minus(judged: Mapping[str, Judged], name: str) -> Judged | None:
    if name not in judged or POINT not in judged:
        return None
    return judged[name].minus(judged[POINT])


def _cell(judged: Judged | None, metric: str, *, bold: bool = False) -> str:
    if judged is None or metric not in judged.metrics:
        return "–"
    text = shown(judged.value(metric))
    return f"**{text}**" if bold else text


def _head(metric: str) -> str:
    return HEADS.get(metric, metric) + _ARROWS[direction_of(metric)]
