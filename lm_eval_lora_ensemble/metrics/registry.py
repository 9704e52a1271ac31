"""Every metric's name and meaning in one place: the registry that the tables, the battery and the docs are made from.

A metric is one function under :func:`metric`. The package's own are in ``definitions/``, a family a file; other
distributions name theirs in the entry-point group :data:`ENTRY_POINTS`. Both are loaded when :data:`METRICS` is first
read, so a module that registers metrics may import this one freely. ``docs/extend.md`` adds one, step by step.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar

from lm_eval_lora_ensemble.errors import EnsembleError, one_line
from lm_eval_lora_ensemble.metrics.arrays import FloatArray

logger = logging.getLogger(__name__)

ENTRY_POINTS = "lm_eval_lora_ensemble.metrics"
"""The entry-point group in whose modules other distributions register metrics."""

Direction = Literal["higher", "lower", ""]
Compute = Callable[..., FloatArray]
_Function = TypeVar("_Function", bound=Compute)

_DEFINITIONS = "lm_eval_lora_ensemble.metrics.definitions"
_ENDINGS = ("_stderr", "_norm")  # lm-eval's, and ours for length-normalised scores
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# what lm-eval or this package writes into a sample under the same names
_TAKEN = {
    "members",
    "golds",
    "lengths",
    "fold",
    "other_class",
    "name",
    "alias",
    "sample_len",
    "doc",
    "doc_id",
    "target",
    "filter",
}


@dataclass(frozen=True)
class Metric:
    """What a metric's number means, and how it is had.

    Attributes:
        name: in every table and file.
        family: ``calibration``, ``information`` or ``selection``; temperature scaling reports the first.
        direction: which way is better; empty for a description.
        unit: nats, or empty for a pure number.
        range: the values it can take, as shown to readers.
        definition: one sentence, or a formula in the symbols of docs/metrics.md.
        source: where it was first described; may be empty.
        needs_gold: whether the gold answers are part of it.
        needs_members: undefined (NaN) for a single member.
        per_document: a mean over documents of ``compute(predictions) -> (D,)``; otherwise it is
            ``compute(documents) -> (R,)`` of :class:`~lm_eval_lora_ensemble.metrics.battery.WeightedDocuments`.
        in_table: shown in lm-eval's table without being asked for.
        column: head of its column in the report's leaderboard; empty for none.
        module: where it was registered.
        compute: the function.
    """

    name: str
    family: str
    direction: Direction
    unit: str
    range: str
    definition: str
    source: str
    needs_gold: bool
    needs_members: bool
    per_document: bool
    in_table: bool
    column: str
    module: str
    compute: Compute

    @property
    def meaning(self) -> dict[str, str]:
        """What a reader of a file must know to read the number."""
        return {
            "family": self.family,
            "direction": self.direction,
            "unit": self.unit,
            "range": self.range,
            "definition": self.definition,
        }

    @property
    def built_in(self) -> bool:
        """Whether it comes with the package."""
        return self.module.startswith(f"{_DEFINITIONS}.")


class Registry(Mapping[str, Metric]):
    """All metrics by name, in order of registration; filled when it is first read."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}
        self._filled = False

    def add(self, one: Metric) -> None:
        """Register a metric; the same module may register it again, as a notebook's cell does.

        Raises:
            EnsembleError: a name that is malformed, taken in lm-eval's samples, or another module's metric.
        """
        if not _NAME.fullmatch(one.name) or one.name.endswith(_ENDINGS) or one.name in _TAKEN:
            raise EnsembleError(
                f"{one.module}: a metric cannot be called {one_line(one.name)!r}; lower-case letters, digits and "
                f"underscores, not ending in {' or '.join(_ENDINGS)}, and none of {', '.join(sorted(_TAKEN))}"
            )
        self._fill()  # the package's own come first, in the tables and where names collide
        other = self._metrics.get(one.name)
        if other is not None and other.module != one.module:
            raise EnsembleError(
                f"{one.module}: the metric {one.name!r} is registered by {other.module} already; name yours otherwise"
            )
        self._metrics[one.name] = one

    def __getitem__(self, name: str) -> Metric:
        """Return a metric; a name that is not registered is a KeyError."""
        self._fill()
        return self._metrics[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        self._fill()
        return iter(tuple(self._metrics))

    def __len__(self) -> int:
        """How many there are."""
        self._fill()
        return len(self._metrics)

    def _fill(self) -> None:
        if self._filled:
            return
        self._filled = True
        own = importlib.import_module(_DEFINITIONS)
        for found in pkgutil.iter_modules(own.__path__, f"{_DEFINITIONS}."):
            importlib.import_module(found.name)
        for entry in entry_points(group=ENTRY_POINTS):
            _load(entry)


def _load(entry: EntryPoint) -> None:
    """Import what another distribution names; its failure must not stop an evaluation."""
    try:
        entry.load()
    except Exception as error:  # noqa: BLE001 - a stranger's module may raise anything
        logger.warning(
            "the metrics of %s cannot be loaded (%s: %s) and are left out; mend or uninstall it",
            entry.value,
            type(error).__name__,
            one_line(error),
        )


METRICS = Registry()
"""The registry that everything reads."""


def metric(
    *,
    family: str,
    direction: Direction,
    range: str,  # noqa: A002 - the word for it
    definition: str,
    name: str = "",
    unit: str = "",
    source: str = "",
    needs_gold: bool = True,
    needs_members: bool = False,
    per_document: bool = False,
    in_table: bool = False,
    column: str = "",
) -> Callable[[_Function], _Function]:
    """Register the decorated function as a metric and return it unchanged.

    Args:
        family: ``calibration``, ``information``, ``selection``, or one of your own.
        direction: ``higher`` or ``lower`` is better, or neither.
        range: the values it can take, such as ``0–1``.
        definition: one sentence or a formula.
        name: the function's own name if left out.
        unit: ``nats``, or nothing.
        source: a paper.
        needs_gold: False for what can be said without knowing the right answers.
        needs_members: NaN for a single member, without being called.
        per_document: the function takes :class:`~lm_eval_lora_ensemble.metrics.predictions.Predictions` and returns
            (D,), whose mean is the metric. Otherwise it takes
            :class:`~lm_eval_lora_ensemble.metrics.battery.WeightedDocuments` and returns (R,).
        in_table: report it in lm-eval's table always, and not only where a task's YAML asks for it.
        column: head of a column in the report's leaderboard.

    Raises:
        EnsembleError: a bad name, or one that another module has registered.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> @metrics.metric(per_document=True, family="calibration", direction="higher", range="0–1",
        ...                 needs_gold=False, definition="share of documents with a confidence of at least 0.9")
        ... def share_sure(predictions):
        ...     return (predictions.confidence >= 0.9).astype(float)
        >>> predictions = metrics.Predictions.from_scores([[0.0, 9.0], [0.0, 0.0]], gold=None)
        >>> float(metrics.METRICS["share_sure"].compute(predictions).mean())
        0.5
    """

    def register(compute: _Function) -> _Function:
        METRICS.add(
            Metric(
                name=name or _attribute(compute, "__name__"),
                family=family,
                direction=direction,
                unit=unit,
                range=range,
                definition=definition,
                source=source,
                needs_gold=needs_gold,
                needs_members=needs_members,
                per_document=per_document,
                in_table=in_table,
                column=column,
                module=_attribute(compute, "__module__"),
                compute=compute,
            )
        )
        return compute

    return register


def _attribute(compute: Any, name: str) -> str:
    """Return the name or module of a function, or of what a partial one is of."""
    return str(getattr(getattr(compute, "func", compute), name))
