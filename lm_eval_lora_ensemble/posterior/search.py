"""Searches along one positive number, each evaluation of which is expensive: all its steps are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lm_eval_lora_ensemble.errors import EnsembleError

_MOST_WIDENINGS = 24


@dataclass(frozen=True)
class Step:
    """One evaluation.

    Attributes:
        at: where.
        value: what was measured there.
        passed: whether the value was good enough; None where nothing was asked.
    """

    at: float
    value: float
    passed: bool | None = None

    def as_mapping(self) -> dict[str, Any]:
        """Return it as JSON, which has no infinities: null where the model overflowed."""
        value = self.value if math.isfinite(self.value) else None
        return {"at": self.at, "value": value, **({} if self.passed is None else {"passed": self.passed})}


def largest_passing(
    measure: Callable[[float], float],
    limit: float,
    *,
    start: float,
    factor: float = 3.0,
    steps: int = 4,
    path: list[Step],
) -> float:
    """Return the largest number found whose measure is at most ``limit``, by bisection on a log scale.

    From ``start`` the bracket widens by ``factor`` until one end passes and the other fails; then it is halved
    ``steps`` times. What is returned has itself been measured and has passed, so a measure that is not monotone costs
    size, never the guarantee.

    Args:
        measure: of a positive number; NaN fails.
        limit: of the measure.
        start: where to begin, above 0.
        factor: of each widening, above 1.
        steps: halvings of the bracket's logarithm; a number larger by ``factor ** (0.5 ** steps)`` has failed.
        path: gets every evaluation in its order.

    Raises:
        EnsembleError: nothing fails, or nothing passes, within 24 widenings.

    Example:
        >>> path = []
        >>> round(largest_passing(lambda x: x * x, 2.0, start=0.5, steps=8, path=path), 2)
        1.41
        >>> [(step.at, step.passed) for step in path[:2]]
        [(0.5, True), (1.5, False)]
    """

    def passes(at: float) -> bool:
        value = measure(at)
        path.append(Step(at, value, value <= limit))
        return value <= limit

    first = passes(start)
    low = high = start
    for _ in range(_MOST_WIDENINGS):
        if first:
            low, high = high, high * factor
            if not passes(high):
                break
        else:
            low, high = low / factor, low
            if passes(low):
                break
    else:
        raise EnsembleError(
            f"from {start:g} to {path[-1].at:g} every value {'passes' if first else 'fails'} the tolerance {limit:g}: "
            "the documents cannot tell; use more of them, or another tolerance"
        )
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def least(
    measure: Callable[[float], float],
    plateau: float,
    *,
    start: float,
    factor: float = 10.0,
    steps: int = 4,
    tolerance: float = 1e-3,
    path: list[Step],
) -> float:
    """Return the measured number with the least measure, which falls, may rise, and ends on a plateau.

    The walk goes up by ``factor`` until the measure is on the plateau for good, or has risen twice from a step that is
    no worse than the plateau, and down as long as the first step was the best; golden section then refines between the
    best step's neighbours.

    Args:
        measure: of a positive number.
        plateau: its limit for large numbers.
        start: where to begin, above 0.
        factor: of each step of the walk.
        steps: golden-section evaluations.
        tolerance: how near the plateau counts as on it, relative to it.
        path: gets every evaluation in its order.

    Example:
        >>> from math import log
        >>> path = []
        >>> found = least(lambda x: (log(x) - 3) ** 2 if x < 1e4 else 40.0, 40.0, start=1.0, steps=12, path=path)
        >>> round(log(found), 1)
        3.0
    """

    def value(at: float) -> float:
        path.append(Step(at, measure(at)))
        return path[-1].value

    grid = [(start, value(start))]
    for _ in range(_MOST_WIDENINGS):
        at = grid[-1][0] * factor
        grid.append((at, value(at)))
        best = min(grid, key=lambda point: point[1])
        near = tolerance * abs(plateau)
        # among steps that are all far worse, a rise says nothing of where the least is
        has_risen = len(grid) - 1 - grid.index(best) >= 2 and best[1] <= plateau + near
        if abs(grid[-1][1] - plateau) <= near or has_risen:
            break
    while min(grid, key=lambda point: point[1]) == grid[0] and len(grid) < 2 * _MOST_WIDENINGS:
        grid.insert(0, (grid[0][0] / factor, value(grid[0][0] / factor)))
    place = min(range(len(grid)), key=lambda i: grid[i][1])
    low, high = grid[max(place - 1, 0)][0], grid[min(place + 1, len(grid) - 1)][0]
    _golden_section(value, math.log(low), math.log(high), steps)
    return min(path, key=lambda step: step.value).at


def _golden_section(value: Callable[[float], float], low: float, high: float, steps: int) -> None:
    """Narrow the bracket [low, high] of log x by ``steps`` evaluations; the caller reads them off its path."""
    ratio = (math.sqrt(5) - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    values: list[float] = []
    for _ in range(steps):
        if not values:
            values = [value(math.exp(inner[0]))]
            continue
        if len(values) == 1:
            values.append(value(math.exp(inner[1])))
            continue
        if values[0] <= values[1]:
            high, inner = inner[1], [inner[1] - ratio * (inner[1] - low), inner[0]]
            values = [value(math.exp(inner[0])), values[0]]
        else:
            low, inner = inner[0], [inner[1], inner[0] + ratio * (high - inner[0])]
            values = [values[1], value(math.exp(inner[1]))]
