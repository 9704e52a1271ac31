"""report.html: one file that needs no network, with everything escaped that comes from a run.

Texts reach the page either through the template engine's autoescaping or as JSON that the page's own script
puts into text nodes. The content security policy allows that one script, by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_lora_ensemble.analysis.scales import METRICS_BY_SCALE
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate
from lm_eval_lora_ensemble.metrics.registry import METRICS
from lm_eval_lora_ensemble.report.answers import answer_rows, detection_rows
from lm_eval_lora_ensemble.report.documents import REASONS, Document
from lm_eval_lora_ensemble.report.entries import short_name
from lm_eval_lora_ensemble.report.leaderboard import COLUMNS, KINDS, Board, Cell, Row, display
from lm_eval_lora_ensemble.report.model import Report

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.report.illustrations import Illustration

FILE_NAME = "report.html"

_TEMPLATES = files("lm_eval_lora_ensemble.report") / "templates"


def render(report: Report, pictures: Sequence[Illustration], folder: Path, notes: Sequence[str]) -> str:
    """Return the page.

    Args:
        report: what it shows.
        pictures: the figures, already written into ``folder``.
        folder: where their SVG files are.
        notes: what is left out, and why.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((_TEMPLATES / "report.html.j2").read_text(encoding="utf-8"))
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    top = [board for board in report.boards if board.top]
    return template.render(
        title=report.options.title,
        statements=report.statements,
        notes=notes,
        columns=_columns(),
        boards=top,
        distribution=report.distribution.label,
        scales=_scales(report),
        answers=answer_rows(report.answers, report.entries),
        answer_detection=detection_rows(report.answers, report.entries),
        lines=_lines(top),
        replicated=any(row.kind == "replicates" for board in top for row in board.rows),
        entries=report.entries,
        settings=report.options.settings,
        pictures=[(picture, _data_uri(folder / f"{picture.name}.svg")) for picture in pictures],
        data=_data(report),
        style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        duration=_duration,
        describe=describe,
    )


def _scales(report: Report) -> list[dict[str, Any]]:
    """Return the rows of the table of scales: a run's task under one scale."""
    return [
        {
            "run": report.entries[index].label,
            "task": task,
            "scale": scale.label,
            "undefined": scale.undefined,
            "ensemble": [display(scale.ensemble[m].value) for m in METRICS_BY_SCALE if not scale.undefined],
            "members": [display(scale.member_mean[m].value) for m in METRICS_BY_SCALE if not scale.undefined],
            "gain": "" if scale.undefined else _difference(scale.difference["nll"]),
        }
        for index, by_task in report.scales.items()
        for task, scales in by_task.items()
        for scale in scales
    ]


def _difference(estimate: Estimate) -> str:
    low, high, _ = estimate.quoted
    return f"{display(estimate.value)} [{display(low)}, {display(high)}]"


def _columns() -> list[dict[str, str]]:
    arrows = {"higher": "↑", "lower": "↓", "": ""}
    return [
        {"key": key, "head": head, "arrow": arrows[METRICS[key].direction], "unit": METRICS[key].unit}
        for key, head in COLUMNS.items()
    ]


def _lines(boards: Sequence[Board]) -> list[dict[str, Any]]:
    """Return the leaderboard's lines: a run's row with its cells of every top-level task side by side."""
    lines: dict[tuple[int, str], dict[str, Any]] = {}
    for b, board in enumerate(boards):
        for row in board.rows:
            line = lines.setdefault(
                (row.entry, row.kind),
                {"entry": row.entry, "kind": row.kind, "label": row.label, "cells": [None] * len(boards)},
            )
            line["cells"][b] = [_cell(row.cells[key]) for key in COLUMNS]
    return [lines[key] for key in sorted(lines, key=lambda key: (key[0], KINDS.index(key[1])))]


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "value": None if math.isnan(cell.value) else cell.value,
        "display": cell.display,
        "interval": _interval(cell),
        "best": cell.best,
        "title": f"n = {cell.n}; {_how(cell)}; "
        f"from {', '.join(Path(s).name for s in cell.source[:3])}{' …' if len(cell.source) > 3 else ''}",
    }


def _how(cell: Cell) -> str:
    if cell.replicates:
        return f"{cell.interval or 'no'} interval over {cell.replicates} replicates"
    return f"{cell.interval or 'no'} interval, {cell.resamples} resamples"


def _interval(cell: Cell) -> str:
    return "" if math.isnan(cell.low) else f"{display(cell.low)} – {display(cell.high)}"


def _data(report: Report) -> dict[str, Any]:
    """Return what the page's script shows on demand: the tasks of groups, and the documents."""
    parents = {
        board.task: [b.task for b in report.boards if b.top and board.task in b.tasks]
        for board in report.boards
        if not board.top and len(board.tasks) == 1
    }
    return {
        "top": [board.task for board in report.boards if board.top],
        "subtasks": [
            {
                "task": board.task,
                "parents": parents[board.task],
                "n": board.documents[1],
                "rows": [_row(row) for row in board.rows],
            }
            for board in report.boards
            if parents.get(board.task)
        ],
        "runs": [entry.label for entry in report.entries],
        "reasons": REASONS,
        "documents": [_document(document) for document in report.documents],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "run": row.entry,
        "kind": row.kind,
        "cells": {key: _compact(row.cells[key]) for key in COLUMNS},
    }


def _compact(cell: Cell) -> dict[str, Any]:
    """Return what a cell shows; thousands of them are on a page, so what is not there is left out."""
    compact: dict[str, Any] = {"display": cell.display}
    if interval := _interval(cell):
        compact["interval"] = interval
    if cell.best:
        compact["best"] = True
    return compact


def _document(document: Document) -> dict[str, Any]:
    return {
        "run": document.entry,
        "task": document.task,
        "number": document.number,
        "question": document.question,
        "choices": document.choices,
        "golds": document.golds,
        "percent": _percent(document.mixture),
        "members": [_percent(member) for member in document.members],
        "entropy": round(document.entropy, 4),
        "information": round(document.mutual_information, 4),
        "reasons": document.reasons,
    }


def _percent(probabilities: Sequence[float]) -> list[float]:
    return [round(100 * p, 1) for p in probabilities]


def _data_uri(file: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def describe(config: Mapping[str, Any]) -> str:
    """Return what a run's configuration says of model and precision, for the table of runs."""
    ensemble = config.get("lora_ensemble")
    base = ensemble.get("base_model") if isinstance(ensemble, Mapping) else None
    parts = [short_name(str(base)) if base else "", str(config.get("model_dtype", "")).removeprefix("torch.")]
    return ", ".join(part for part in parts if part)
