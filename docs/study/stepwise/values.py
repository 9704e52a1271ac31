"""Values with their intervals: over documents with one seed, over documents and seeds together with several.

With several seeds a value is the mean over them, and a difference has Student's interval over seeds besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lm_eval_lora_ensemble.analysis.replicates import spread
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.metrics.bootstrap import Bootstrapped


@dataclass(frozen=True)
class Value:
    """A number with its interval; NaN where there is none.

    Attributes:
        value: the mean over seeds.
        low, high: over documents, and over seeds too where there are several.
        deviation: standard deviation over seeds; NaN for one.
        student: Student's interval over seeds; NaN for one.
    """

    value: float
    low: float
    high: float
    deviation: float = math.nan
    student: tuple[float, float] = (math.nan, math.nan)

    @property
    def limits(self) -> tuple[float, float]:
        """The ends of all its intervals together; NaN where it has none."""
        lows, highs = (self.low, self.student[0]), (self.high, self.student[1])
        return float(np.fmin(*lows)), float(np.fmax(*highs))

    @property
    def excludes_zero(self) -> bool:
        """Whether every interval of it does, Student's over seeds included."""
        low, high = self.limits
        return low > 0 or high < 0


@dataclass(frozen=True)
class Judged:
    """One method on one task: the resamples of each seed, by seed; all methods' are paired."""

    by_seed: Mapping[int, Bootstrapped]
    settings: Settings

    @property
    def metrics(self) -> list[str]:
        """Names of what was judged."""
        return list(next(iter(self.by_seed.values())).value)

    def value(self, metric: str) -> Value:
        """Return a metric's value."""
        parts = list(self.by_seed.values())
        if len(parts) == 1:
            estimate = parts[0].estimate(metric)
            low, high, _ = estimate.quoted
            return Value(estimate.value, low, high)
        resampled = np.stack([part.resampled[metric] for part in parts])
        found = spread(
            [part.value[metric] for part in parts], resampled, self.settings.level, self.settings.seed
        )
        return Value(found.mean, *found.two_way, found.standard_deviation, found.t)

    def minus(self, other: Judged) -> Judged | None:
        """Return the difference, paired by document and by seed; None where no seed has both."""
        shared = [seed for seed in self.by_seed if seed in other.by_seed]
        if not shared:
            return None
        return Judged({seed: self.by_seed[seed].minus(other.by_seed[seed]) for seed in shared}, self.settings)


def best(rows: Mapping[str, Judged], metric: str, direction: str) -> str | None:
    """Return the row that is better than every other by an interval that excludes 0; None where there is none.

    Args:
        rows: methods on one task.
        metric: by which.
        direction: ``higher``, ``lower``, or "" for a metric without a better end.
    """
    values = {name: row.value(metric).value for name, row in rows.items() if metric in row.metrics}
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    if not direction or len(known) < 2:
        return None
    first = (max if direction == "higher" else min)(known, key=known.__getitem__)
    for name in known:
        difference = rows[first].minus(rows[name]) if name != first else None
        if name != first and (difference is None or not difference.value(metric).excludes_zero):
            return None
    return first
