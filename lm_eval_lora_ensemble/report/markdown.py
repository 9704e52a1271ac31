"""The leaderboard as Markdown, to paste into a model card or a pull request, and as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_lora_ensemble.report.leaderboard import COLUMNS, KINDS, Board, Cell, display

ANSWER_HEADS = ("run", "task", "score", "mean", "AUROC of errors ↑", "AURC ↓", "PRR ↑")

_ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def to_markdown(
    title: str, boards: Sequence[Board], statements: Sequence[str], answers: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return headline statements, a table for each top-level task, best values bold, and one of generated answers."""
    lines = [f"# {escape(title)}", "", *(f"- {escape(s)}" for s in statements), ""]
    for board in boards:
        if not board.top:
            continue
        pooled = f", {len(board.tasks)} tasks pooled (micro)" if len(board.tasks) > 1 else ""
        lines += [f"## {escape(board.task)}", "", f"{_count(board)} documents{pooled}", ""]
        cells = board.rows[0].cells
        heads = [f"{head}{_ARROWS[cells[name].direction]}" for name, head in COLUMNS.items()]
        lines += ["| |" + "|".join(heads) + "|", "|---|" + "---:|" * len(heads)]
        for row in board.rows:
            shown = [_with_interval(row.cells[name]) for name in COLUMNS]
            lines.append(f"|{escape(row.label)}|" + "|".join(shown) + "|")
        lines += ["", *(f"*{escape(note)}*" for note in board.notes), ""]
    if answers:
        lines += [
            "## Generated answers",
            "",
            "|" + "|".join(ANSWER_HEADS) + "|",
            "|---|---|---|" + "---:|" * 4,
        ]
        for answer in answers:
            names = [escape(str(answer[key])) for key in ("run", "task", "score")]
            lines.append("|" + "|".join([*names, answer["mean"], *answer["errors"]]) + "|")
        lines.append("")
    lines.append(
        "Intervals: bootstrap over documents; of replicates, t over ensembles of other seeds. Bold: better than every "
        "other row, by a paired interval, or by t where both rows have replicates."
    )
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def to_csv(boards: Sequence[Board]) -> str:
    """Return a line a run and row, with a value and its limits for every task and metric."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    rows: dict[tuple[int, str], dict[str, Cell]] = {}
    labels: dict[tuple[int, str], str] = {}
    for board in boards:
        for row in board.rows:
            key = (row.entry, row.kind)
            labels.setdefault(key, row.label)
            rows.setdefault(key, {}).update({f"{board.task}/{m}": c for m, c in row.cells.items()})
    names = [f"{board.task}/{metric}" for board in boards for metric in COLUMNS]
    writer.writerow(["row", "kind", *(f"{n}{end}" for n in names for end in ("", "/low", "/high"))])
    for key in sorted(rows, key=lambda key: (key[0], KINDS.index(key[1]))):
        values = [number for name in names for number in _numbers(rows[key].get(name))]
        writer.writerow([_plain(labels[key]), key[1], *values])
    return stream.getvalue()


def escape(text: str) -> str:
    """Show a name as text: nothing in it is markup, in Markdown or in the HTML that it becomes."""
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # an underscore inside a word, and brackets that no parenthesis follows, mean nothing in Markdown
    safe = re.sub(r"([\\`*|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", safe)
    return re.sub(r"\](?=[\[(:])", r"\\]", safe)


def _plain(text: str) -> str:
    # a spreadsheet would run a cell that begins like a formula
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _numbers(cell: Cell | None) -> list[str]:
    values = (cell.value, cell.low, cell.high) if cell else (math.nan,) * 3
    return ["" if math.isnan(value) else repr(value) for value in values]


def _count(board: Board) -> str:
    low, high = board.documents
    return str(low) if low == high else f"{low} to {high}"


def _with_interval(cell: Cell) -> str:
    value = f"**{cell.display}**" if cell.best else cell.display
    return value if math.isnan(cell.low) else f"{value} [{display(cell.low)}, {display(cell.high)}]"
