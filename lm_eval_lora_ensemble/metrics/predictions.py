"""One task's (or one group's) member probabilities with what is needed to judge them, validated once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import (
    SUM_TOLERANCE,
    BoolArray,
    FloatArray,
    IntArray,
    StringArray,
    as_counts,
    as_float,
    as_is_gold,
    first_index,
)
from lm_eval_lora_ensemble.metrics.choices import log_choice_probabilities, with_other_class


@dataclass(frozen=True, eq=False)
class Predictions:
    """Distributions of N members over the choices of D documents.

    Documents may have different numbers of choices: document d has ``counts[d]``, and its entries from
    there on are padding with log-probability −inf. Build it from scores with :meth:`from_scores`.

    Attributes:
        log_probabilities: (N, D, C) float64, nats; each document's exponentials sum to 1.
        counts: (D,), number of choices, from 2 to C.
        is_gold: (D, C), which choices are right, at least one; None where the samples do not tell.
        subjects: (D,), the task each document belongs to; resampling of groups is clustered by it.
        documents: (D,), what identifies a document within its subject.
        missing_gold: why ``is_gold`` is None.
        alone: (N, D, C), each member's log-probabilities as its own run would have them, where that is another
            scale than the one that all members share; None where it is the same.

    Raises:
        EnsembleError: from the constructor, for shapes that disagree, a NaN, distributions that do not sum
            to 1, padding with probability, fewer than two choices, or a gold outside the choices.

    Example:
        >>> from lm_eval_lora_ensemble import metrics
        >>> scores = [[[0.0, 2.0], [1.0, 0.0]], [[0.0, 4.0], [0.0, 1.0]]]  # 2 members, 2 documents, 2 choices
        >>> predictions = metrics.Predictions.from_scores(scores, gold=[1, 1])
        >>> predictions.n_members, predictions.n_documents, predictions.mixture.sum(axis=1).tolist()
        (2, 2, [1.0, 1.0])
        >>> predictions.confidence.round(3).tolist(), predictions.correct.tolist()
        ([0.931, 0.5], [True, False])
    """

    log_probabilities: FloatArray
    counts: IntArray
    is_gold: BoolArray | None
    subjects: StringArray
    documents: StringArray
    missing_gold: str = ""
    alone: FloatArray | None = None

    def __post_init__(self) -> None:
        values = as_float(self.log_probabilities, "log_probabilities", ndim=3)
        _, d, c = values.shape
        for name, array in (
            ("counts", self.counts),
            ("subjects", self.subjects),
            ("documents", self.documents),
        ):
            if np.shape(array) != (d,):
                raise EnsembleError(
                    f"{name} has shape {np.shape(array)}; one value for each of {d} documents is needed"
                )
        if ((self.counts < 2) | (self.counts > c)).any():
            (index,) = first_index((self.counts < 2) | (self.counts > c))
            raise EnsembleError(f"document {index} has {self.counts[index]} choices; 2 to {c} are needed")
        if np.isnan(values).any() or (values[:, self.padding] != -np.inf).any():
            raise EnsembleError("log_probabilities has a NaN, or probability beyond a document's choices")
        off = np.abs(np.exp(values).sum(axis=2) - 1) > SUM_TOLERANCE
        if off.any():
            member, index = first_index(off)
            raise EnsembleError(f"the choices of document {index} do not sum to 1 for member {member}")
        if self.is_gold is not None:
            if np.shape(self.is_gold) != (d, c):
                raise EnsembleError(f"is_gold has shape {np.shape(self.is_gold)}; ({d}, {c}) is needed")
            as_is_gold(self.is_gold, self.counts, c)
        if self.alone is not None and np.shape(self.alone) != values.shape:
            raise EnsembleError(f"alone has shape {np.shape(self.alone)}; {values.shape} is needed")

    @classmethod
    def from_scores(
        cls,
        loglikelihoods: npt.ArrayLike,
        gold: npt.ArrayLike | None,
        *,
        counts: npt.ArrayLike | None = None,
        subjects: npt.ArrayLike | str = "",
        documents: npt.ArrayLike | None = None,
        other_class: bool = False,
        missing_gold: str = "the gold answers were not given",
    ) -> Predictions:
        """Normalise members' loglikelihoods over each document's choices.

        Args:
            loglikelihoods: (N, D, C), nats, padded with −inf; (D, C) is taken as a single member.
            gold: (D,), index of the right choice, or (D, C) booleans where several may be; None if unknown.
            counts: (D,), number of choices; C everywhere if left out.
            subjects: (D,) labels, or one for all.
            documents: (D,) identifiers; 0 to D − 1 if left out.
            other_class: add the class "other" = 1 − Σ p(letters) instead of normalising, for single-token
                choices (see :func:`~lm_eval_lora_ensemble.metrics.choices.with_other_class`). It is
                the document's last choice.
            missing_gold: why ``gold`` is None, for the error of metrics that need it.

        Raises:
            EnsembleError: as the constructor, or scores that no distribution follows from.
        """
        scores = as_float(loglikelihoods, "loglikelihoods")
        if scores.ndim == 2:
            scores = scores[None]
        if scores.ndim != 3:
            raise EnsembleError(f"loglikelihoods has shape {scores.shape}; (N, D, C) is needed")
        _, d, c = scores.shape
        sizes = as_counts(counts, d, c, least=1 if other_class else 2)
        labels = np.asarray(subjects, dtype=np.str_)
        if labels.shape not in ((), (d,)):
            raise EnsembleError(
                f"subjects has shape {labels.shape}; one label, or one for each of {d} documents, is needed"
            )
        if other_class:
            p = with_other_class(scores)
            other, p[..., -1] = p[..., -1].copy(), 0.0
            p[:, np.arange(d), sizes] = other  # after the document's own letters, before the padding
            with np.errstate(divide="ignore"):
                log_p = np.log(p)
            sizes = sizes + 1
        else:
            log_p = log_choice_probabilities(scores)
        return cls(
            log_probabilities=log_p,
            counts=sizes,
            is_gold=None if gold is None else as_is_gold(gold, sizes, log_p.shape[2]),
            subjects=np.broadcast_to(labels, (d,)),
            documents=np.asarray(np.arange(d) if documents is None else documents).astype(np.str_),
            missing_gold=missing_gold if gold is None else "",
        )

    @classmethod
    def concatenate(cls, parts: Iterable[Predictions]) -> Predictions:
        """Pool the documents of several tasks scored by the same members.

        Raises:
            EnsembleError: nothing to pool, or different numbers of members.
        """
        parts = list(parts)
        if not parts:
            raise EnsembleError("there is no task to pool")
        sizes = sorted({part.n_members for part in parts})
        if len(sizes) > 1:
            raise EnsembleError(
                f"tasks scored by different numbers of members ({', '.join(map(str, sizes))}) "
                "cannot be pooled; evaluate them with one ensemble"
            )
        width = max(part.log_probabilities.shape[2] for part in parts)
        padded = [widen(part.log_probabilities, width, -np.inf) for part in parts]
        golds = [widen(part.is_gold, width) for part in parts if part.is_gold is not None]
        alone = [part.alone if part.alone is not None else part.log_probabilities for part in parts]
        return cls(
            log_probabilities=np.concatenate(padded, axis=1),
            counts=np.concatenate([part.counts for part in parts]),
            is_gold=np.concatenate(golds) if len(golds) == len(parts) else None,
            subjects=np.concatenate([part.subjects for part in parts]),
            documents=np.concatenate([part.documents for part in parts]),
            missing_gold=next((part.missing_gold for part in parts if part.is_gold is None), ""),
            alone=np.concatenate([widen(a, width, -np.inf) for a in alone], axis=1)
            if any(part.alone is not None for part in parts)
            else None,
        )

    @property
    def n_members(self) -> int:
        """N."""
        return int(self.log_probabilities.shape[0])

    @property
    def n_documents(self) -> int:
        """D."""
        return int(self.log_probabilities.shape[1])

    @cached_property
    def clusters(self) -> StringArray | None:
        """(D,): the tasks, which resampling draws as a whole; None for documents of one task, drawn one by one."""
        return self.subjects if (self.subjects != self.subjects[:1]).any() else None

    @cached_property
    def padding(self) -> BoolArray:
        """(D, C): true where the document has no such choice."""
        mask: BoolArray = np.arange(self.log_probabilities.shape[2]) >= self.counts[:, None]
        return mask

    @cached_property
    def probabilities(self) -> FloatArray:
        """(N, D, C)."""
        p: FloatArray = np.exp(self.log_probabilities)
        return p

    @cached_property
    def mixture(self) -> FloatArray:
        """(D, C): the ensemble's distribution p̄, the members' mean."""
        mean: FloatArray = self.probabilities.mean(axis=0)
        return mean

    @cached_property
    def log_mixture(self) -> FloatArray:
        """(D, C): log p̄ in nats, finite also where p̄ itself would underflow."""
        if self.n_members == 1:
            return self.log_probabilities[0]
        with np.errstate(divide="ignore"):
            total: FloatArray = special.logsumexp(self.log_probabilities, axis=0)
        return total - np.log(self.n_members)

    @cached_property
    def confidence(self) -> FloatArray:
        """(D,): max_c p̄(c)."""
        top: FloatArray = self.mixture.max(axis=1)
        return top

    @cached_property
    def least_confidence(self) -> FloatArray:
        """(D,): 1 − max_c p̄(c), in [0, 1 − 1/C].

        It is the sum of the other choices, least first, because a difference from 1 is 0 for all documents that are
        surer than 1 − 2⁻⁵³, and summed loglikelihoods of long answers are.
        """
        others: FloatArray = np.sort(self.mixture, axis=1)[:, :-1].sum(axis=1)
        return others

    @cached_property
    def correct(self) -> BoolArray:
        """(D,): whether argmax_c p̄(c) is a gold choice; the first of equal ones is chosen."""
        right: BoolArray = self.require_gold()[np.arange(self.n_documents), self.mixture.argmax(axis=1)]
        return right

    @cached_property
    def log_gold_mass(self) -> FloatArray:
        """(D,): log P_G in nats, the logarithm of the mass that p̄ gives to the gold choices; −inf if none."""
        golds = np.where(self.require_gold(), self.log_mixture, -np.inf)
        with np.errstate(divide="ignore"):
            mass: FloatArray = special.logsumexp(golds, axis=1)
        return mass

    @cached_property
    def has_several_golds(self) -> bool:
        """Whether some document has more than one right choice."""
        return self.is_gold is not None and bool((self.is_gold.sum(axis=1) > 1).any())

    def require_gold(self) -> BoolArray:
        """Return ``is_gold``, (D, C).

        Raises:
            EnsembleError: it is unknown; the message says why.
        """
        if self.is_gold is None:
            raise EnsembleError(f"the gold answers are needed and unknown: {self.missing_gold}")
        return self.is_gold

    def only(self, members: Sequence[int]) -> Predictions:
        """Return the ensemble of these members only, on the scale that all members share.

        Raises:
            EnsembleError: none, or one that does not exist.
        """
        return self.with_log_probabilities(self.log_probabilities[some_members(members, self.n_members)])

    def member(self, index: int) -> Predictions:
        """Return one member as its own run would have it: on its own scale, where that is another.

        Raises:
            EnsembleError: there is no such member.
        """
        if self.alone is None or not 0 <= index < self.n_members:
            return self.only([index])
        return self.with_log_probabilities(self.alone[[index]])

    def with_log_probabilities(self, log_probabilities: FloatArray) -> Predictions:
        """Return the same documents with other distributions (N', D, C)."""
        return replace(self, log_probabilities=log_probabilities, alone=None)

    def with_members_alone(self, log_probabilities: FloatArray) -> Predictions:
        """Return the same with each member's own distributions (N, D, C), which :meth:`member` then gives."""
        return replace(self, alone=log_probabilities)

    def take(self, documents: npt.ArrayLike) -> Predictions:
        """Return a selection of the documents, by index or by mask.

        It has the columns that these documents need, so that it is the same whatever it was selected from.

        Raises:
            EnsembleError: nothing was selected.
        """
        index = np.asarray(documents)
        if not index.size:
            raise EnsembleError("no document was selected")
        counts = self.counts[index]
        width = counts.max(initial=2)
        return Predictions(
            self.log_probabilities[:, index, :width],
            counts,
            None if self.is_gold is None else self.is_gold[index, :width],
            self.subjects[index],
            self.documents[index],
            self.missing_gold,
            None if self.alone is None else self.alone[:, index, :width],
        )


def some_members(members: Sequence[int], n_members: int) -> list[int]:
    """Return a choice of members as it was asked for.

    Raises:
        EnsembleError: none, or one that does not exist.
    """
    chosen = [int(m) for m in members]
    if not chosen or not all(0 <= m < n_members for m in chosen):
        raise EnsembleError(f"members {chosen} asked for; there are 0 to {n_members - 1}")
    return chosen


def widen(array: Any, width: int, fill: float = 0) -> Any:
    """Return ``array`` (…, C) with its last axis padded to ``width`` choices by ``fill``."""
    missing = [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])]
    return np.pad(array, missing, constant_values=fill)


def same_documents(a: Predictions, b: Predictions) -> bool:
    """Whether a paired comparison of the two is one."""
    try:
        check_same_documents(a, b)
    except EnsembleError:
        return False
    return True


def check_same_documents(a: Predictions, b: Predictions) -> None:
    """Refuse a paired comparison of different documents.

    Raises:
        EnsembleError: another number, order, identity or gold answer of documents; the first is named.
    """
    if a.n_documents != b.n_documents:
        raise EnsembleError(
            f"a paired comparison needs the same documents: {a.n_documents} against {b.n_documents}; "
            "run both with the same tasks, --limit and --samples"
        )
    differs = (a.subjects != b.subjects) | (a.documents != b.documents) | (a.counts != b.counts)
    if a.is_gold is not None and b.is_gold is not None:
        width = max(a.is_gold.shape[1], b.is_gold.shape[1])
        differs |= (widen(a.is_gold, width) != widen(b.is_gold, width)).any(axis=1)
    if differs.any():
        (index,) = first_index(differs)
        raise EnsembleError(
            f"a paired comparison needs the same documents: number {index} is {a.subjects[index]}/"
            f"{a.documents[index]} in one run and {b.subjects[index]}/{b.documents[index]} in the other"
        )
