"""Samples of tasks of whole strings: read as arrays, and their few values with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import FloatArray
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate, ResamplingPlan, bootstrap
from lm_eval_lora_ensemble.metrics.strings import STRING_METRICS, Unit, quantities, ratio

_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class StringScores:
    """What the members gave each string of a task.

    Attributes:
        members: (N, D) loglikelihoods, nats.
        counts: (D,) tokens, and bytes and words where the task counts them; NaN where a number is not known.
    """

    members: FloatArray
    counts: Mapping[Unit, FloatArray]

    @property
    def n_members(self) -> int:
        """N."""
        return int(self.members.shape[0])

    @property
    def n_documents(self) -> int:
        """D."""
        return int(self.members.shape[1])

    def metrics(self) -> list[str]:
        """Return the names in ``STRING_METRICS`` whose counts the task has."""
        return [name for name, metric in STRING_METRICS.items() if metric.unit in self.counts]


@dataclass(frozen=True)
class StringResult:
    """A task of whole strings.

    Attributes:
        documents: D.
        metrics: by the names of ``STRING_METRICS``.
        members: each member's own value, of each ``nll_per_…``.
    """

    documents: int
    metrics: dict[str, Estimate]
    members: dict[str, tuple[float, ...]]


def is_whole_string(sample: Mapping[str, Any]) -> bool:
    """Whether a sample carries one score a member, and not one for each choice."""
    members = sample.get("members")
    return isinstance(members, list) and bool(members) and not any(isinstance(one, list) for one in members)


class StringReader:
    """Collects the samples of one file, in whatever order its ranks wrote them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._members: dict[int, list[float]] = {}
        self._pairs: dict[int, dict[str, Any]] = {}

    def add(self, sample: Mapping[str, Any], number: int) -> None:
        """Take the sample of line ``number``.

        Raises:
            EnsembleError: the document was there before, or it is no sample of whole strings of this run.
        """
        place = f"{self._path}, line {number}"
        try:
            document, members = int(sample["doc_id"]), [float(score) for score in sample["members"]]
            # where the task reports something of its own under a name, ours has another
            logged = {
                name: sample.get(f"ensemble_{name}", sample.get(name))
                for name in STRING_METRICS
                if name in sample or f"ensemble_{name}" in sample
            }
            pairs = {
                name: (float(nats), float("nan") if count is None else float(count))
                for name, (nats, count) in logged.items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise EnsembleError(
                f"{place}: not a sample of whole strings ({type(error).__name__}: {error})"
            ) from error
        if document in self._members:
            raise EnsembleError(
                f"{place}: document {document} occurs twice; two runs were written to one file"
            )
        first = next(iter(self._members), document)
        if len(members) != len(self._members.get(first, members)):
            raise EnsembleError(
                f"{place}: {len(members)} members, {len(self._members[first])} before; "
                "samples of two ensembles were mixed"
            )
        if pairs.keys() != self._pairs.get(first, pairs).keys():
            raise EnsembleError(f"{place}: other metrics than before; two runs were written to one file")
        _check(members, pairs, place)
        self._members[document], self._pairs[document] = members, pairs

    def scores(self) -> StringScores:
        """Return the documents by their numbers."""
        order = sorted(self._members)
        counts: dict[Unit, FloatArray] = {
            STRING_METRICS[name].unit: np.array([self._pairs[document][name][1] for document in order])
            for name in self._pairs[order[0]]
        }
        return StringScores(np.array([self._members[document] for document in order]).T, counts)


def _check(members: list[float], pairs: Mapping[str, tuple[float, float]], place: str) -> None:
    """Refuse logged values that the members' scores do not give."""
    found = quantities(np.array(members)[:, None])
    for name, (nats, _) in pairs.items():
        if not np.isclose(
            nats, found[STRING_METRICS[name].quantity][0], rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True
        ):
            raise EnsembleError(
                f"{place}: the logged {name} does not follow from the scores; the file was edited or put together "
                "from two runs"
            )


def evaluate_strings(scores: StringScores, plan: ResamplingPlan) -> StringResult:
    """Compute a task's values with their intervals over documents, members held fixed."""
    found = quantities(scores.members)
    names = scores.metrics()

    def ratios(weights: FloatArray) -> dict[str, FloatArray]:
        with np.errstate(invalid="ignore"):  # a jackknife of one document leaves nothing
            return {
                name: (weights @ found[STRING_METRICS[name].quantity])
                / (weights @ scores.counts[STRING_METRICS[name].unit])
                for name in names
            }

    drawn = bootstrap(ratios, plan)
    alone = [name for name in names if STRING_METRICS[name].quantity == "nll"]
    return StringResult(
        documents=scores.n_documents,
        metrics={name: drawn.estimate(name) for name in names},
        members={
            name: tuple(ratio(-member, scores.counts[STRING_METRICS[name].unit]) for member in scores.members)
            for name in alone
        },
    )
