"""The report in sentences: what averaging the members changed, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lm_eval_lora_ensemble.metrics.detection import Detection
from lm_eval_lora_ensemble.report.entries import Entry
from lm_eval_lora_ensemble.report.leaderboard import Board, Cell, display

_MEASURES = {"accuracy": "accuracy", "nll": "nll", "ece": "ece"}
_SCORES = {"entropy": "entropy", "mutual_information": "mutual information"}


def sentences(
    entries: Sequence[Entry],
    boards: Sequence[Board],
    detections: Mapping[int, Mapping[str, Mapping[str, Mapping[str, Detection]]]],
) -> list[str]:
    """Return a sentence for each ensemble and top-level task, and one for each pair of domains."""
    said = []
    for board in (b for b in boards if b.top):
        for row in board.rows:
            if row.entry in board.gains and row.kind == "ensemble":
                gains = board.gains[row.entry]
                parts = [
                    f"{name} {row.cells[m].display} ({_change(gains[m])})" for m, name in _MEASURES.items()
                ]
                n = row.cells["nll"].n
                said.append(f"{row.label} on {board.task}, {n} documents: {', '.join(parts)}.")
    for index, by_inside in detections.items():
        for inside, by_outside in by_inside.items():
            for outside, by_score in by_outside.items():
                said.append(f"{entries[index].label} tells {outside} from {inside} {_auroc(by_score)}.")
    return said


def _change(gain: Cell) -> str:
    """Say by how much the ensemble differs from its mean member, and whether the interval decides it."""
    limits = f"[{display(gain.low)}, {display(gain.high)}]"
    if gain.low <= 0 <= gain.high:
        return f"not told from its mean member's, difference {limits}"
    size = display(abs(gain.value))
    return f"{size} {'above' if gain.value > 0 else 'below'} its mean member's, difference {limits}"


def _auroc(by_score: Mapping[str, Detection]) -> str:
    parts = []
    for score, name in _SCORES.items():
        if score in by_score:
            auroc = by_score[score].auroc
            low, high, _ = auroc.quoted
            parts.append(f"by {name} with AUROC {display(auroc.value)} [{display(low)}, {display(high)}]")
    return " and ".join(parts)
