"""Labelled documents of a task under one adapter: the engine's scores of it and of its neighbours, and gradients.

A method that fits noise to a task asks three things: which documents, how an adapter scores their choices, and how
those scores depend on the adapter. The base model is loaded once, with the source's adapter on it; other adapters of
its shape take its place for as long as they are scored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness import rendering
from lm_eval_lora_ensemble.harness.rendering import RenderedDocument, Split
from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray
from lm_eval_lora_ensemble.posterior.contract import Source, StoredState
from lm_eval_lora_ensemble.posterior.lora_layers import carried_names, one_adapter
from lm_eval_lora_ensemble.train.base import Base
from lm_eval_lora_ensemble.train.examples import Choice, Example
from lm_eval_lora_ensemble.train.layout import Layout
from lm_eval_lora_ensemble.train.objective import ScoredHead, loglikelihoods
from lm_eval_lora_ensemble.train.scale import ChoiceScale
from lm_eval_lora_ensemble.tree.requests import truncate

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.harness.loaded import LoadedEnsemble

_OF_THE_WHOLE = ("pretrained", "adapters", "members", "epoch", "average")


@dataclass(frozen=True)
class Documents:
    """Some multiple-choice documents: D of them with up to C choices.

    Attributes:
        split: they are from.
        rendered: the documents as texts.
    """

    split: str
    rendered: tuple[RenderedDocument, ...]

    def __len__(self) -> int:
        return len(self.rendered)

    @property
    def is_gold(self) -> BoolArray:
        """Which choices are right, (D, C)."""
        result = np.zeros((len(self), max(len(document.requests) for document in self.rendered)), dtype=bool)
        for row, document in zip(result, self.rendered, strict=True):
            row[list(document.golds)] = True
        return result

    def as_mapping(self) -> dict[str, Any]:
        """Return what the manifest says of them: the places in each task's split, as JSON."""
        tasks: dict[str, list[int]] = {}
        for document in self.rendered:
            tasks.setdefault(document.task, []).append(document.doc_id)
        return {"split": self.split, "tasks": tasks}


class TaskData:
    """A task's labelled documents, and the base model with the source's adapter on it.

    The documents are found at once; the model is loaded when it is first asked for.

    Args:
        source: whose one adapter is loaded.
        task: multiple-choice lm-eval task; several: ``A,B``.
        split: ``training`` or ``validation``; never the one that lm-eval evaluates.
        limit: only the first N documents of each task.
        num_fewshot: examples in front of each document; None is the task's own number.
        model_args: further arguments of the model, as lm-eval's: ``device``, ``dtype``, ``batch_size`` …
        include_path: a folder of further task YAMLs.

    Raises:
        EnsembleError: the source is several adapters, a task is unknown, not multiple choice, without that split, or
            evaluated on it, a limit below 1, or an argument that is not the model's to take.

    Example:
        >>> data = TaskData(source, "arc_easy", model_args={"device": "cpu"})  # doctest: +SKIP
        >>> documents = data.sample(64)  # doctest: +SKIP
        >>> data.loglikelihoods(documents, source.adapters[0].state).shape  # doctest: +SKIP
        (64, 5)
    """

    def __init__(
        self,
        source: Source,
        task: str,
        split: str = "training",
        limit: int | None = None,
        num_fewshot: int | None = None,
        model_args: Mapping[str, Any] | None = None,
        include_path: str | None = None,
    ) -> None:
        self.source = source
        self.adapter = one_adapter(source, "a method that needs a task")
        self.task = task
        self.split = split
        self.limit = limit
        self.num_fewshot = num_fewshot
        self.model_args = dict(model_args or {})
        if split not in get_args(Split):
            raise EnsembleError(
                f"split={split}: a posterior is fitted to training or validation documents, never to those that it "
                "will be judged on"
            )
        if limit is not None and limit < 1:
            raise EnsembleError(f"limit={limit}: give a whole number above 0")
        for name in _OF_THE_WHOLE:
            if name in self.model_args:
                raise EnsembleError(f"{name}= in the model's arguments: the source decides it; leave it out")
        names = [name.strip() for name in task.split(",") if name.strip()]
        self._tasks = rendering.load_tasks(names, include_path)
        for name, loaded in self._tasks.items():
            _require_usable(name, loaded, split)
        self._documents: dict[str, dict[str, list[Any]]] = {}

    @property
    def total(self) -> int:
        """Number of documents of the split, ``limit`` applied."""
        return sum(len(docs) for docs in self._split_documents(self.split).values())

    @functools.cached_property
    def has_validation(self) -> bool:
        """Whether every task has validation documents that lm-eval does not evaluate."""
        return all(
            task.has_validation_docs() and not rendering.is_evaluated(task, "validation")
            for task in self._tasks.values()
        )

    def sample(
        self, count: int, *, split: str | None = None, apart_from: Documents | None = None
    ) -> Documents:
        """Render documents that lie evenly over the split, so that one sorted by subject is covered too.

        Args:
            count: how many at most.
            split: where from; None is the data's own.
            apart_from: documents of the same data that are not to be among them.

        Raises:
            EnsembleError: no document is left, or one has no right answer.
        """
        where = self.split if split is None else split
        taken = (
            {(d.task, d.doc_id) for d in apart_from.rendered}
            if apart_from and apart_from.split == where
            else set()
        )
        of_task = self._split_documents(where)
        places = [
            (name, i) for name, docs in of_task.items() for i in range(len(docs)) if (name, i) not in taken
        ]
        if not places:
            left = f"has only the {len(taken)} documents that are in use" if taken else "is empty"
            raise EnsembleError(
                f"the {where} split of {self.task} {left}; use fewer of them, or another task"
            )
        count = min(count, len(places))
        chosen = [places[i * len(places) // count] for i in range(count)]
        rendered: list[RenderedDocument] = []
        for name, task in self._tasks.items():
            ids = [i for owner, i in chosen if owner == name]
            rendered += rendering.render(task, _as_split(where), of_task[name], ids, self.num_fewshot)
        return Documents(where, tuple(rendered))

    def loglikelihoods(self, documents: Documents, state: StoredState | None = None) -> FloatArray:
        """Score every choice with the engine, under an adapter in the source's place.

        Args:
            documents: D of them.
            state: the adapter's tensors, of the source's names and shapes; None is the source itself.

        Returns:
            float64 (D, C), nats, summed over a choice's tokens; −inf for a choice that a document lacks.

        Raises:
            EnsembleError: a score is NaN or infinite, or the tensors are not those of the source's shape.
        """
        pairs = [pair for document in documents.rendered for pair in document.requests]
        loaded = self._loaded
        contexts, continuations = map(list, zip(*pairs, strict=True))
        with self._in_place(self.adapter.state if state is None else state):
            flat = loaded.loglikelihoods(contexts, continuations)[0]
        is_gold = documents.is_gold
        scores = np.full(is_gold.shape, -np.inf)
        end = 0
        for row, document in zip(scores, documents.rendered, strict=True):
            start, end = end, end + len(document.requests)
            row[: end - start] = flat[start:end]
        return scores

    def divisors(self, documents: Documents, scale: ChoiceScale) -> FloatArray:
        """Return what ``scale`` divides the loglikelihoods by, (D, C); 1 for a choice that a document lacks.

        Raises:
            EnsembleError: the scale is by characters, and a choice has none.
        """
        return scale.as_array([self._example(document) for document in documents.rendered])

    def differentiable(
        self, documents: Documents, scale: ChoiceScale, per_pass: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield the scaled scores [d, C] of ``per_pass`` documents after another, as functions of the adapter.

        Each document is one row a choice, or one tree row where that is exact. The adapter's float32 weights are the
        leaves: require gradients of those that matter, and take each pass's gradients before the next. A choice that a
        document lacks has score −inf.

        Args:
            documents: D of them.
            scale: as in :meth:`divisors`.
            per_pass: documents of one forward pass.
        """
        model, lm = self.model, self._loaded.model
        examples = [self._example(document) for document in documents.rendered]
        exact = _tree_is_exact(
            Base(model.base_model.model, lm, self.source.base_model, lm.max_length), examples
        )
        dtype = model.base_model.model.dtype
        head = ScoredHead(model.base_model.model)
        for start in range(0, len(examples), per_pass):
            part = examples[start : start + per_pass]
            layout = Layout(part, gold_only=False, use_tree=exact, dtype=dtype, scale=scale)
            batch = layout.batch([range(len(part))], max(layout.lengths()), lm.device)
            scores = loglikelihoods(head.logits(batch), batch) / batch.divisor
            yield scores.masked_fill(~batch.is_choice, -torch.inf)[0]

    @property
    def model(self) -> Any:
        """The ``PeftModel`` with the source's adapter, in eval mode."""
        return self._loaded.model.model

    @property
    def adapter_name(self) -> str:
        """PEFT's name of the adapter on :attr:`model`."""
        name: str = self.model.active_adapter
        return name

    @functools.cached_property
    def _loaded(self) -> LoadedEnsemble:
        from lm_eval_lora_ensemble.harness.loaded import load_ensemble

        arguments = {"batch_size": "auto", **self.model_args}
        if self.source.revision is not None:
            arguments.setdefault("revision", self.source.revision)
        loaded = load_ensemble(self.source.base_model, [self.adapter.folder], **arguments)
        if loaded.model.backend != "causal":
            raise EnsembleError(
                f"{self.source.base_model} is no causal language model; choose a method without a task"
            )
        return loaded

    @functools.cached_property
    def _carried(self) -> frozenset[str]:
        """Names of the base's own tensors in the adapter's file, which are on the model for good."""
        return frozenset(carried_names(self.adapter))

    def _split_documents(self, split: str) -> dict[str, list[Any]]:
        if split not in self._documents:
            self._documents[split] = {
                name: rendering.split_documents(task, _as_split(split))[: self.limit]
                for name, task in self._tasks.items()
            }
        return self._documents[split]

    def _example(self, document: RenderedDocument) -> Example:
        """Tokenise a document as the engine does, cut to the model's length from the left."""
        lm = self._loaded.model
        base = Base(lm.model, lm, self.source.base_model, lm.max_length)
        lengths = document.characters or (None,) * len(document.requests)
        choices = []
        for texts, characters in zip(document.requests, lengths, strict=True):
            try:
                request = truncate(*base.encode(*texts), lm.max_length)
            except ValueError as error:
                raise EnsembleError(
                    f"document {document.doc_id} of {document.task}: {error}; fix the task"
                ) from error
            context = request.tokens[: len(request.tokens) - len(request.targets) + 1]
            choices.append(Choice(context, request.targets, characters))
        return Example(document.task, document.doc_id, tuple(choices), document.golds)

    @contextmanager
    def _in_place(self, state: StoredState) -> Iterator[None]:
        """Let the model answer with ``state`` for a while; the source's own tensors come back whatever happens."""
        if state is self.adapter.state:
            yield
            return
        try:
            self._put(state)
            yield
        finally:
            self._put(self.adapter.state)

    def _put(self, state: StoredState) -> None:
        """Copy an adapter's tensors onto the model's.

        Raises:
            EnsembleError: names or shapes other than the source's.
        """
        from peft import set_peft_model_state_dict

        own = self.adapter.state
        odd = sorted({*state} ^ {*own}) or [name for name in own if state[name].shape != own[name].shape]
        if odd:
            raise EnsembleError(f"an adapter to be scored differs from {self.adapter.name} in {odd[0]}")
        adapter = {name: state[name] for name in state if name not in self._carried}
        result = set_peft_model_state_dict(self.model, adapter, adapter_name=self.adapter_name)
        if result.unexpected_keys:
            raise RuntimeError(f"PEFT has no place for {result.unexpected_keys[0]}")


def _as_split(split: str) -> Split:
    return "validation" if split == "validation" else "training"


def _require_usable(name: str, task: Any, split: str) -> None:
    """Refuse a task without labelled choices in that split, or judged on it."""
    other = "training" if split == "validation" else "validation"
    if task.OUTPUT_TYPE != "multiple_choice":
        raise EnsembleError(f"task {name!r} is {task.OUTPUT_TYPE}; a posterior is fitted to multiple choice")
    if not (task.has_training_docs() if split == "training" else task.has_validation_docs()):
        raise EnsembleError(f"task {name!r} has no {split} split; try split={other}, or another task")
    if rendering.is_evaluated(task, _as_split(split)):
        raise EnsembleError(
            f"task {name!r} is evaluated on its {split} split, to which no posterior may be fitted; try split={other}, "
            "or another task"
        )


def _tree_is_exact(base: Base, examples: Sequence[Example]) -> bool:
    """Whether a document may be one tree row: it saves tokens, and a trial on this model finds it exact."""
    from lm_eval_lora_ensemble.train.tree import failed_trial, why_no_tree_rows

    return why_no_tree_rows(base, examples) is None and failed_trial(base) is None
