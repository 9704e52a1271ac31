"""Which figures a report gets, and their captions; what they look like is :mod:`.figures`' business."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm_eval_lora_ensemble import figures
from lm_eval_lora_ensemble.analysis.answers import AnswerResult
from lm_eval_lora_ensemble.analysis.domains import out_of_domain
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate
from lm_eval_lora_ensemble.metrics.detection import Detection
from lm_eval_lora_ensemble.metrics.ensemble_size import SizeMetrics, by_size
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.report.answers import Answers
from lm_eval_lora_ensemble.report.entries import Entry, is_last_epoch
from lm_eval_lora_ensemble.report.series import Between, EpochPoint, Series

_COLUMNS = 2
_SIZE_METRICS = ("accuracy", "nll", "ece", "mutual_information")
_PANEL = (5.6, 4.6)  # inches

Draw = Callable[[Axes], object]
Score = Literal["predictive_entropy", "mutual_information"]


@dataclass(frozen=True)
class Illustration:
    """A figure of the report: one or several panels, written as ``{name}.svg`` and ``{name}.png``."""

    name: str
    title: str
    caption: str
    panels: Sequence[Draw]

    def write(self, folder: Path) -> None:
        """Draw all panels and write both files into ``folder``."""
        rows = -(-len(self.panels) // _COLUMNS)
        figure = Figure(figsize=(_PANEL[0] * _COLUMNS, _PANEL[1] * rows), layout="constrained")
        for i, draw in enumerate(self.panels, start=1):
            draw(figure.add_subplot(rows, _COLUMNS, i))
        figures.save(figure, folder / self.name)


def choose(
    entries: Sequence[Entry],
    series: Sequence[Series],
    between: Sequence[Between],
    detections: Mapping[int, Mapping[str, Mapping[str, Mapping[str, Detection]]]],
    settings: Settings,
) -> list[Illustration]:
    """Return the figures of a report, those of whole sweeps first.

    Args:
        entries: the runs.
        series: epochs by ensemble and task.
        between: comparisons of swept ensembles.
        detections: by run, in-domain task, out-of-domain task and score.
        settings: bins, resamples, level.
    """
    return [
        *_of_series(series, between, settings.level),
        *(
            picture
            for index, by_inside in detections.items()
            for picture in _of_detection(index, entries[index], by_inside, settings.level)
        ),
        *(
            picture
            for index, entry in enumerate(entries)
            if is_last_epoch(entry, entries)
            for task in entry.run.top_level()
            for picture in _of_task(index, entry, task, settings)
        ),
    ]


def of_answers(entries: Sequence[Entry], answers: Mapping[int, Answers]) -> list[Illustration]:
    """Return a figure for each run's tasks of generated texts that have right and wrong: risk against coverage."""
    return [
        Illustration(
            _name("answers", index, task),
            f"{entries[index].label} on {task}: which answers to withhold?",
            "Error rate among the answers that a score finds surest, a line for each score, a panel for each filter.",
            [partial(_answer_panel, filter_key, result) for filter_key, result in judged.items()],
        )
        for index, of_run in answers.items()
        for task, by_filter in of_run.results.items()
        if (judged := {key: result for key, result in by_filter.items() if result.errors})
    ]


def _answer_panel(filter_key: str, result: AnswerResult, ax: Axes) -> object:
    curves = {score: told.risk_coverage for score, told in result.errors.items()}
    title = None if filter_key == "none" else filter_key
    return figures.plot_risk_coverage_by_score(curves, documents=result.documents, title=title, ax=ax)


def _name(*parts: object) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(map(str, parts)))[:120]


def _of_task(index: int, entry: Entry, task: str, settings: Settings) -> Iterator[Illustration]:
    p = entry.run.predictions(task)
    if p.is_gold is None:
        return
    n = f"{p.n_documents} documents, {p.n_members} member{'s' if p.n_members > 1 else ''}"
    yield Illustration(
        _name("task", index, task),
        f"{entry.label} on {task}",
        f"{n}. Reliability with {settings.bins} bins and Wilson intervals; confidence of right and wrong answers; "
        "what members disagree about against all uncertainty; error rate among the most certain documents.",
        [
            lambda ax: figures.plot_reliability(p, bins=settings.bins, level=settings.level, ax=ax),
            lambda ax: figures.plot_confidence_histogram(p, bins=settings.bins, ax=ax),
            lambda ax: figures.plot_information_map(p, ax=ax),
            lambda ax: figures.plot_risk_coverage(p, level=settings.level, ax=ax),
        ],
    )
    if p.n_members == 1:
        return
    rows = by_size(p, bins=settings.bins, max_subsets=16, seed=settings.seed, metrics=_SIZE_METRICS)

    yield Illustration(
        _name("size", index, task),
        f"{entry.label} on {task}: how many members are enough?",
        f"{n}. Mean over ensembles of k of the members, and the spread between them.",
        [partial(_size_panel, rows, metric) for metric in _SIZE_METRICS],
    )


def _size_panel(rows: Sequence[SizeMetrics], metric: str, ax: Axes) -> object:
    return figures.plot_by_size(rows, metric=metric, ax=ax)


def _of_detection(
    index: int, entry: Entry, by_inside: Mapping[str, Mapping[str, Mapping[str, Detection]]], level: float
) -> Iterator[Illustration]:
    for inside, by_outside in by_inside.items():
        here = entry.run.predictions(inside)
        there = {name: out_of_domain(entry.run, inside, name) for name in by_outside}
        scores: list[Score] = ["predictive_entropy"]
        if here.n_members > 1:
            scores.append("mutual_information")
        yield Illustration(
            _name("detection", index, inside),
            f"{entry.label}: does it know that it left {inside}?",
            "Uncertainty in-domain and out-of-domain, and each score's AUROC with its interval: 0.5 is chance, above "
            "it the score rises out-of-domain, below it the score falls.",
            [
                *(partial(_histogram, here, there, score, inside) for score in scores),
                partial(_dots, by_outside, f"n = {here.n_documents} in-domain documents", level),
            ],
        )


def _histogram(
    here: Predictions, there: Mapping[str, Predictions], score: Score, inside: str, ax: Axes
) -> object:
    return figures.plot_uncertainty_histograms(here, there, score=score, in_domain_name=inside, ax=ax)


def _dots(rows: Mapping[str, Mapping[str, Detection]], note: str, level: float, ax: Axes) -> object:
    return figures.plot_detection(rows, note=note, level=level, ax=ax)


def _of_series(series: Sequence[Series], between: Sequence[Between], level: float) -> Iterator[Illustration]:
    for task in dict.fromkeys(s.task for s in series):
        having = [s for s in series if s.task == task]
        n = _n(having[0])
        yield Illustration(
            _name("epochs", task),
            f"{task}: epoch by epoch",
            f"{n}; epoch 0 is the prior. M = 1 is the mean single member. Bands are intervals over documents.",
            [partial(_epoch_panel, having, metric, level) for metric in _EPOCH_LABELS],
        )
        if any(point.retention for s in having for point in s.points):
            yield Illustration(
                _name("retention", task),
                f"{task}: what is left of the prior",
                f"{n}. Kept: of what the prior answered right, the share still right. Gained: of what it "
                "answered wrong, the share right now. Agreement, total variation and divergence are from the prior.",
                [partial(_retention_panel, having, measure, level) for measure in _RETENTION_LABELS],
            )
    for first, second in dict.fromkeys((b.first, b.second) for b in between):
        of_pair = [b for b in between if (b.first, b.second) == (first, second)]
        yield Illustration(
            _name("between", first, second),
            f"{first} against {second}",
            "Two ensembles at the same epoch: share of equal predictions, and mean total variation distance.",
            [
                partial(_between_panel, of_pair, "agreement", "agreement, share", level),
                partial(_between_panel, of_pair, "total_variation", "total variation", level),
            ],
        )


def _n(series: Series) -> str:
    return f"n = {series.documents} documents"


def _between_panel(pairs: Sequence[Between], measure: str, label: str, level: float, ax: Axes) -> object:
    curves = [figures.Curve(b.task, tuple(map(float, b.epochs)), getattr(b, measure)) for b in pairs]
    return figures.plot_curves(curves, ylabel=label, level=level, ax=ax)


_EPOCH_LABELS = {
    "accuracy": "accuracy, share",
    "nll": "nll, nats",
    "ece": "ece, share",
    "predictive_entropy": "predictive entropy, nats",
    "mutual_information": "mutual information, nats",
}
_RETENTION_LABELS = {
    "kept": "kept of the prior's right answers, share",
    "gained": "gained of the prior's wrong answers, share",
    "agreement": "agreement with the prior, share",
    "total_variation": "total variation from the prior",
    "kl_to_prior": "divergence from the prior, nats",
}


def _epoch_panel(series: Sequence[Series], metric: str, level: float, ax: Axes) -> object:
    # one member has no mutual information
    single = metric != "mutual_information"
    curves = _curves(series, lambda p: p.ensemble[metric], lambda p: p.single[metric] if single else None)
    return figures.plot_curves(curves, ylabel=_EPOCH_LABELS[metric], level=level, note=_n(series[0]), ax=ax)


def _retention_panel(series: Sequence[Series], measure: str, level: float, ax: Axes) -> object:
    curves = _curves(series, lambda p: p.retention.get(measure), lambda p: p.retention_single.get(measure))
    return figures.plot_curves(
        curves, ylabel=_RETENTION_LABELS[measure], level=level, note=_n(series[0]), ax=ax
    )


def _curves(
    series: Sequence[Series],
    of_ensemble: Callable[[EpochPoint], Estimate | None],
    of_single: Callable[[EpochPoint], Estimate | None],
) -> list[figures.Curve]:
    """Return the curves of the mean member and of the ensemble, for each series."""
    curves = []
    for s in series:
        members = max(point.members for point in s.points)
        name = f"{s.label}, " if len(series) > 1 else ""
        kinds = [(1, of_single), (members, of_ensemble)] if members > 1 else [(1, of_ensemble)]
        for m, estimate_of in kinds:
            known = [(float(p.epoch), e) for p in s.points if (e := estimate_of(p)) is not None]
            if known:
                x, estimates = zip(*known, strict=True)
                curves.append(figures.Curve(f"{name}M = {m}", x, estimates))
    return curves
