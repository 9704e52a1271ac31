"""What a report is: what was asked for, and everything that its files are made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.analysis.distribution import Distribution
from lm_eval_lora_ensemble.analysis.result import Settings, plain
from lm_eval_lora_ensemble.analysis.scales import ScaleResult
from lm_eval_lora_ensemble.metrics.detection import Detection
from lm_eval_lora_ensemble.report.answers import Answers
from lm_eval_lora_ensemble.report.documents import Document
from lm_eval_lora_ensemble.report.entries import Entry
from lm_eval_lora_ensemble.report.leaderboard import Board
from lm_eval_lora_ensemble.report.series import Between, Series

Detections = dict[int, dict[str, dict[str, dict[str, Detection]]]]


@dataclass(frozen=True)
class Options:
    """What a report holds.

    Attributes:
        title: of the page.
        ood: tasks or groups that are out-of-domain.
        settings: bins, resamples, seed, level.
        documents: about how many documents the page shows.
        figures: at most how many figures are drawn.
        replicates: places of runs that differ in their seeds only, by set; others are found by provenance.
    """

    title: str = "How far can these probabilities be trusted?"
    ood: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    documents: int = 3000
    figures: int = 24
    replicates: tuple[tuple[Path, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Report:
    """Everything the files are made from.

    Attributes:
        options: what was asked for.
        entries: the runs.
        boards: the leaderboard, groups before the tasks they hold.
        detections: by run, in-domain task, out-of-domain task and score.
        series: epochs by ensemble and task.
        between: swept ensembles against each other.
        documents: the documents worth looking at.
        statements: the report in sentences.
        notes: what is left out or not comparable, and why.
        answers: of every run with tasks of generated texts.
        scales: by run and top-level task, what the choice of scale changes.
    """

    options: Options
    entries: list[Entry]
    boards: list[Board]
    detections: Detections
    series: list[Series]
    between: list[Between]
    documents: list[Document]
    statements: list[str]
    notes: list[str]
    scales: dict[int, dict[str, list[ScaleResult]]] = field(default_factory=dict)
    answers: dict[int, Answers] = field(default_factory=dict)

    @property
    def distribution(self) -> Distribution:
        """Which distribution over the choices is judged."""
        return self.entries[0].run.distribution

    def to_dict(self) -> dict[str, Any]:
        """Return report.json: every cell with its value, limits, direction, n and samples files."""
        return plain(
            {
                "generator": f"lm-eval-lora-ensemble {version('lm-eval-lora-ensemble')}",
                "title": self.options.title,
                "settings": self.options.settings,
                "ood": self.options.ood,
                "runs": [
                    {
                        "label": entry.label,
                        "source": entry.run.source,
                        "date": entry.run.date,
                        "members": entry.run.n_members,
                        "epoch": entry.run.epoch,
                        "seconds": entry.run.seconds,
                        "config": entry.run.config,
                        "files": entry.run.files,
                    }
                    for entry in self.entries
                ],
                "statements": self.statements,
                "distribution": self.distribution,
                "leaderboard": self.boards,
                "scales": self.scales,
                "answers": self.answers,
                "detection": self.detections,
                "series": self.series,
                "between": self.between,
                "notes": self.notes,
            }
        )
