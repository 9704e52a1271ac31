"""The short answer: each member alone, their mean, and the ensemble, on each task of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from lm_eval_lora_ensemble.metrics.calibration import expected_calibration_error
from lm_eval_lora_ensemble.metrics.information import mutual_information, predictive_entropy
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.proper_scores import negative_loglikelihood

COLUMNS = ("accuracy ↑", "nll ↓", "ece ↓", "entropy", "mutual information")


@dataclass(frozen=True)
class SummaryRow:
    """One line of the table: who, and its values in the order of ``COLUMNS`` (nats but for the first and third)."""

    label: str
    values: tuple[float, ...]


def summarise(predictions: Predictions) -> list[SummaryRow]:
    """Return a row per member, one for their mean, and the ensemble's.

    The mean row is the mean of the members' own values: what one member gives on average.
    """
    members = [_values(predictions.only([m])) for m in range(predictions.n_members)]
    rows = [SummaryRow(f"member {m}", values) for m, values in enumerate(members)]
    mean = tuple(float(value) for value in np.mean(members, axis=0))
    return [
        *rows,
        SummaryRow("mean of members", mean),
        SummaryRow(f"ensemble of {len(members)}", _values(predictions)),
    ]


def _values(predictions: Predictions) -> tuple[float, ...]:
    gold, probabilities = predictions.require_gold(), predictions.probabilities
    return (
        float(predictions.correct.mean()),
        float(negative_loglikelihood(predictions.mixture, gold).mean()),
        expected_calibration_error(predictions.confidence, predictions.correct),
        float(predictive_entropy(probabilities).mean()),
        float(mutual_information(probabilities).mean()),
    )


def to_rich(title: str, rows: Sequence[SummaryRow]) -> Table:
    """Return a table for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{value:.3f}" for value in row.values]
        last = row is rows[-1]
        table.add_row(row.label, *cells, style="bold" if last else "", end_section=row is rows[-3])
    return table
