"""The report in sentences: what averaging the members changed, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lm_eval_lora_ensemble.metrics.detection import Detection
from lm_eval_lora_ensemble.report.entries import Entry
from lm_eval_lora_ensemble.report.leaderboard import Board, Cell, display

_MEASURES = {"accuracy": "accuracy", "nll": "nll", "ece": "ece"}
_SCORES = {"entropy": "entropy", "mutual_information": "mutual information"}
_CHANCE = 0.5


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
                said.append(_between_domains(entries[index].label, inside, outside, by_score))
    return said


def _change(gain: Cell) -> str:
    """Say by how much the ensemble differs from its mean member, and whether the interval decides it."""
    if math.isnan(gain.low):
        return "no interval of the difference from its mean member's"
    limits = f"[{display(gain.low)}, {display(gain.high)}]"
    if gain.low <= 0 <= gain.high:
        return f"does not differ measurably from its mean member's, difference {limits}"
    size = display(abs(gain.value))
    return f"{size} {'above' if gain.value > 0 else 'below'} its mean member's, difference {limits}"


def _between_domains(label: str, inside: str, outside: str, by_score: Mapping[str, Detection]) -> str:
    """Say which scores rise out-of-domain, which do not measurably, and which fall."""
    rises, others = [], []
    for score, name in _SCORES.items():
        if score not in by_score:
            continue
        detection = by_score[score]
        low, high, _ = detection.auroc.quoted
        value = f"AUROC {display(detection.auroc.value)} [{display(low)}, {display(high)}]"
        note = f" ({detection.note})" if detection.note else ""
        if low > _CHANCE:
            rises.append(f"by {name} with {value}{note}")
        elif high < _CHANCE:
            others.append(f"{name} is lower on {outside} than on {inside}, {value}, below chance{note}")
        elif low <= _CHANCE <= high:
            others.append(f"{name} does not differ measurably between {outside} and {inside}, {value}{note}")
        else:
            others.append(f"{name} has no AUROC of {outside} against {inside}{note}")
    said = [f"{label} tells {outside} from {inside} {' and '.join(rises)}."] if rises else []
    return " ".join([*said, *(f"{label}: {other}." for other in others)])
