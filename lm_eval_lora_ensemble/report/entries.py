"""The runs of a report under the names a reader sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_lora_ensemble.analysis.run import Run
from lm_eval_lora_ensemble.ensemble.manifest import described
from lm_eval_lora_ensemble.errors import one_line

_LONGEST_LABEL = 80


@dataclass(frozen=True, eq=False)
class Entry:
    """One run of the report.

    Attributes:
        label: short and unique within the report; safe to print.
        run: its predictions.
        series: index of the ensemble whose epochs this run belongs to; None outside a sweep.
    """

    label: str
    run: Run
    series: int | None = None


def make_entries(runs: Sequence[Run]) -> list[Entry]:
    """Name every run by its method, ensemble or model; by epoch, folder, date or number where that is not enough."""
    labels = [_label(run) for run in runs]
    folders = [f"of {short_name(run.series)}" if _method(run) and run.series else "" for run in runs]
    for more in (folders, [run.date[:19] for run in runs], [f"#{i}" for i in range(1, len(runs) + 1)]):
        count = Counter(labels)
        labels = [
            f"{label} {extra}".strip() if count[label] > 1 else label
            for label, extra in zip(labels, more, strict=True)
        ]
    keys = [_series_key(run) for run in runs]
    swept = [key for key, n in Counter(k for k in keys if k is not None).items() if n > 1]
    return [
        Entry(label, run, swept.index(key) if key in swept else None)
        for label, run, key in zip(labels, runs, keys, strict=True)
    ]


def is_last_epoch(entry: Entry, entries: Sequence[Entry]) -> bool:
    """Whether an entry is the last epoch of its series, or of no series: what a report looks at closely."""
    epochs = [e.run.epoch or 0 for e in entries if e.series == entry.series]
    return entry.series is None or (entry.run.epoch or 0) == max(epochs)


def short_name(path: str) -> str:
    """Return the last part of a folder's or a model's name, safe to print and not too long."""
    return one_line(path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1])[:_LONGEST_LABEL]


def _method(run: Run) -> str:
    """Return how a run's members were drawn, with the settings; "" of members that were trained."""
    ensemble = run.config.get("lora_ensemble")
    method = ensemble.get("method") if isinstance(ensemble, Mapping) else None
    if not isinstance(method, Mapping) or run.epoch == 0:
        return ""
    settings = method.get("settings")
    said = described(str(method.get("name")), settings if isinstance(settings, Mapping) else {})
    return one_line(said)[:_LONGEST_LABEL]


def _label(run: Run) -> str:
    ensemble = run.config.get("lora_ensemble")
    if method := _method(run):
        return f"{method}, {run.n_members} draw{'s' if run.n_members > 1 else ''}"
    if isinstance(ensemble, Mapping):
        name = short_name(run.series.split(";")[0]) or short_name(str(ensemble.get("base_model", "")))
        if run.epoch == 0:
            return f"{name} prior"
        epoch = "" if run.epoch is None else f" epoch {run.epoch}"
        return f"{name or 'ensemble'}{epoch} ×{run.n_members}"
    parts = [short_name(str(run.arguments[key])) for key in ("pretrained", "peft") if run.arguments.get(key)]
    return " + ".join(parts) or short_name(str(run.config.get("model") or run.source))


def _series_key(run: Run) -> tuple[Any, ...] | None:
    """Return what the epochs of one ensemble have in common; None for runs of no epoch."""
    ensemble = run.config.get("lora_ensemble")
    if run.epoch is None or not run.series or not isinstance(ensemble, Mapping):
        return None
    return (ensemble.get("base_model"), run.series)
