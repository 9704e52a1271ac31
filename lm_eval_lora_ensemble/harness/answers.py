"""Tasks of generated texts (``generate_until``): from the texts of a document to the table.

A document logs ``generation``, a block for each text, and under each score its mean over these texts. The texts are
those of ``Instance.resps``: filters make plain strings of what a task judges, and leave these alone.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import defaultdict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean
from lm_eval.config.group import AggMetricConfig

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.generation.answer import EnsembleText
from lm_eval_lora_ensemble.harness.document import RENAMED, document_hash
from lm_eval_lora_ensemble.metrics.answers import ANSWER_SCORES

OUTPUT_TYPE = "generate_until"

_LOGGED = "generation"

logger = logging.getLogger(__name__)


@dataclass
class AnswerState:
    """What a task of generated texts reported.

    Attributes:
        reported: by the name in lm-eval's table, the name in ``ANSWER_SCORES``; empty until the task reports any.
        instances: the requests that ``texts`` was made of.
        texts: of each document by its hash; a document that occurs several times has an entry for each time.
        asked: how often a document's texts were asked for.
    """

    reported: dict[str, str] = field(default_factory=dict)
    instances: Any = None
    texts: dict[str, list[list[Any]]] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def _state_of(task: Any) -> AnswerState:
    if "_answer_uncertainty" not in vars(task):
        task._answer_uncertainty = AnswerState()
    state: AnswerState = task._answer_uncertainty
    if state.instances is not task.instances:
        state.instances = task.instances
        state.texts = _by_document(task.instances)
        state.asked.clear()
    return state


def _by_document(instances: Any) -> dict[str, list[list[Any]]]:
    """Return the responses of each document, in lm-eval's order of documents."""
    documents: dict[Any, list[Any]] = defaultdict(list)
    for instance in instances or ():
        documents[instance.doc_id].append(instance)
    found = defaultdict(list)
    for of_document in documents.values():
        ordered = sorted(of_document, key=lambda instance: instance.idx)
        found[document_hash(ordered[0].doc)].append([text for one in ordered for text in one.resps])
    return found


# ------------------------------------------------------------------------------------------ a document


def extended(task: Any, doc: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    """Return the stock metrics of one document with ours, and how its texts came about, added.

    A task none of whose texts carries a trace, because another model wrote them, is left as it is.
    """
    if "bypass" in task._metric_fn_list or not isinstance(stock, dict):
        return stock
    state = _state_of(task)
    if not state.reported:
        if not any(_carries(text) for each in state.texts.values() for d in each for text in d):
            return stock
        state.reported = _names_in_table(task, stock)
    texts = _texts(state, doc)
    if texts is None:
        _warn_once(task.config.task, "changes its documents as it scores them: uncertainty is NaN for these")
    blocks = [text.to_dict() for text in texts or () if _carries(text)]
    return {
        **stock,
        _LOGGED: blocks,
        **{shown: _mean([block[name] for block in blocks]) for shown, name in state.reported.items()},
    }


def _texts(state: AnswerState, doc: dict[str, Any]) -> list[Any] | None:
    """Return the texts of a document; equal documents take turns, which is lm-eval's order in each pass of a filter."""
    digest = document_hash(doc)
    found = state.texts.get(digest)
    if found is None:
        return None
    turn = state.asked[digest]
    state.asked[digest] += 1
    return found[turn % len(found)]


def _carries(text: Any) -> bool:
    return isinstance(text, EnsembleText) and text.trace is not None


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _names_in_table(task: Any, stock: dict[str, Any]) -> dict[str, str]:
    """Choose the task's metrics by their names in lm-eval's table; what the task reports itself keeps its name."""
    theirs = {*stock, *task._metric_fn_list}
    wanted = [name for name, score in ANSWER_SCORES.items() if score.in_table]
    return {f"{RENAMED}{name}" if name in theirs else name: name for name in wanted}


# ---------------------------------------------------------------------------------------------- a task


def set_texts_aside(task: Any, raw_metrics: MutableMapping[tuple[str, str], list[Any]]) -> None:
    """Put the number of members in the place of what is logged but no metric."""
    if not _reported(task):
        return
    for _, filter_key in [key for key in raw_metrics if key[0] == _LOGGED]:
        blocks = raw_metrics.pop((_LOGGED, filter_key))
        raw_metrics["members", filter_key] = [
            len(block["members"]) for of_document in blocks for block in of_document
        ]


def aggregations(task: Any) -> dict[str, Callable[..., Any]]:
    """Return how lm-eval aggregates each of our metrics; none where the task reported none."""
    shown = _reported(task)
    return {"members": _number_of_members, **dict.fromkeys(shown, mean)} if shown else {}


def _reported(task: Any) -> dict[str, str]:
    state: AnswerState | None = vars(task).get("_answer_uncertainty")
    return state.reported if state else {}


def _number_of_members(sizes: list[int]) -> int:
    """Return N, which every text of a run shares."""
    if len(set(sizes)) > 1:
        raise EnsembleError(
            f"texts of different numbers of members ({sorted(set(sizes))}) in one run; "
            "if --use_cache is on, the cache belongs to another ensemble: name a new one"
        )
    return sizes[0] if sizes else 0


# --------------------------------------------------------------------------------------------- a group


def extend_group(
    aggregate: Callable[[Any, Any], dict[str, Any]], group: Any, task_metrics: dict[str, Any]
) -> dict[str, Any]:
    """Aggregate a group with our metrics added, where all its tasks report them: means weighted by documents."""
    tasks = list(group.get_all_tasks())
    shown = set.intersection(*(set(_reported(task)) for task in tasks)) if tasks else set()
    if not shown or not group.aggregate_metric_list:
        return aggregate(group, task_metrics)
    listed = {entry.metric for entry in group.aggregate_metric_list}
    extended_group = copy.copy(group)
    extended_group.aggregate_metric_list = [
        *group.aggregate_metric_list,
        *(AggMetricConfig(metric=name) for name in _reported(tasks[0]) if name in shown - listed),
    ]
    return aggregate(extended_group, task_metrics)


@functools.cache
def _warn_once(task: str, what: str) -> None:
    logger.warning("task %s %s", task, what)
