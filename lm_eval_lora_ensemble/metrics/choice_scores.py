"""Members' scores of choices, before a scale makes distributions of them.

A loglikelihood of an answer written out grows with its length, so a softmax over the choices' sums measures length as
much as belief. Which distribution is judged is therefore declared ::

    p_m(c) = softmax_c( l_m(c) / (T · length(c)) )

with a length in characters, bytes or tokens, or 1 for the sums as they are, and a temperature T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray, IntArray, StringArray
from lm_eval_lora_ensemble.metrics.choices import log_choice_probabilities
from lm_eval_lora_ensemble.metrics.predictions import Predictions, some_members, widen

ScoreKind = Literal["sum", "chars", "bytes", "tokens"]
SCORE_KINDS: tuple[ScoreKind, ...] = get_args(ScoreKind)


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """One task's scores of N members, D documents and up to C choices.

    Attributes:
        loglikelihoods: (N, D, C) sums over a choice's tokens, nats; −inf where a document has no such choice.
        counts: (D,), number of choices.
        is_gold: (D, C), which choices are right; None where the samples do not tell.
        subjects: (D,), the task each document belongs to.
        documents: (D,), what identifies a document within its subject.
        folds: (D,), the part of a cross-fit that each document belongs to; equal documents share one.
        lengths: (D, C) by kind, as far as they are known; 0 where a document has no such choice.
        other_class: the choices are single tokens, and what is left of their probability is one more choice, "other".
        missing_gold: why ``is_gold`` is None.
    """

    loglikelihoods: FloatArray
    counts: IntArray
    is_gold: BoolArray | None
    subjects: StringArray
    documents: StringArray
    folds: IntArray
    lengths: Mapping[str, FloatArray] = field(default_factory=dict)
    other_class: bool = False
    missing_gold: str = ""

    @property
    def n_members(self) -> int:
        """N."""
        return int(self.loglikelihoods.shape[0])

    @property
    def n_documents(self) -> int:
        """D."""
        return int(self.loglikelihoods.shape[1])

    def per_unit(self, kind: ScoreKind = "sum") -> Predictions:
        """Return the distributions of scores per unit of length, at T = 1.

        Raises:
            EnsembleError: the lengths are unknown, a choice has length 0, the class "other" is asked for per length, or
                scores that no distribution follows from.
        """
        return Predictions.from_scores(
            self.loglikelihoods / self._length(kind),
            self.is_gold,
            counts=self.counts,
            subjects=self.subjects,
            documents=self.documents,
            other_class=self.other_class,
            missing_gold=self.missing_gold,
        )

    def predictions(
        self,
        kind: ScoreKind = "sum",
        temperature: npt.ArrayLike = 1.0,
        *,
        alone: npt.ArrayLike | None = None,
    ) -> Predictions:
        """Return the distributions of a declared scale.

        Args:
            kind: ``sum`` for the loglikelihoods as they are, else the unit of length they are divided by.
            temperature: T, one or (D,); all members of a document share it, so that mutual information is ≥ 0.
            alone: (N, 1) or (N, D), the temperature of each member's own run; the shared one if left out.

        Raises:
            EnsembleError: as :meth:`per_unit`, or a temperature that is not positive.

        Example:
            >>> from lm_eval_lora_ensemble import metrics
            >>> scores = metrics.ChoiceScores.of([[[-4.0, -12.0]]], lengths={"chars": [[4, 12]]})
            >>> scores.predictions("chars").mixture.tolist()  # one nat a character, both
            [[0.5, 0.5]]
        """
        raw = self.per_unit(kind)
        own = None if alone is None else scale(raw.log_probabilities, alone)
        shared = raw.with_log_probabilities(scale(raw.log_probabilities, temperature))
        return shared if own is None else shared.with_members_alone(own)

    def _length(self, kind: ScoreKind) -> FloatArray:
        if kind not in SCORE_KINDS:
            raise EnsembleError(f"scores={kind} is unknown; use one of {', '.join(SCORE_KINDS)}")
        if kind == "sum":
            return np.ones_like(self.loglikelihoods[0])
        if self.other_class:
            raise EnsembleError("the class 'other' is defined for sums of single tokens; use scores=sum")
        if kind not in self.lengths:
            raise EnsembleError(
                f"the samples of {self.subjects[0]} do not say how many {kind} a choice has; evaluate again with this "
                "release, or use another scale"
            )
        length = self.lengths[kind]
        present = np.arange(length.shape[1]) < self.counts[:, None]
        if (present & (length <= 0)).any():
            d, c = np.argwhere(present & (length <= 0))[0]
            raise EnsembleError(
                f"choice {c} of document {self.documents[d]} of {self.subjects[d]} is empty: it has no score per {kind}"
            )
        return np.where(present, length, 1.0)

    def only(self, members: Sequence[int]) -> ChoiceScores:
        """Return the scores of these members only.

        Raises:
            EnsembleError: none, or one that does not exist.
        """
        return replace(self, loglikelihoods=self.loglikelihoods[some_members(members, self.n_members)])

    @classmethod
    def of(
        cls,
        loglikelihoods: npt.ArrayLike,
        is_gold: npt.ArrayLike | None = None,
        *,
        lengths: Mapping[str, npt.ArrayLike] | None = None,
        counts: npt.ArrayLike | None = None,
        subject: str = "",
        documents: npt.ArrayLike | None = None,
        folds: npt.ArrayLike | None = None,
        other_class: bool = False,
    ) -> ChoiceScores:
        """Build scores from arrays (N, D, C); what is left out is plain: all choices there, documents numbered."""
        values = np.asarray(loglikelihoods, dtype=np.float64)
        _, d, c = values.shape
        return cls(
            values,
            np.full(d, c) if counts is None else np.asarray(counts),
            None if is_gold is None else np.asarray(is_gold, dtype=np.bool_),
            np.array([subject] * d, dtype=np.str_),
            np.asarray(np.arange(d) if documents is None else documents).astype(np.str_),
            np.arange(d) % 5 if folds is None else np.asarray(folds),
            {kind: np.asarray(length, dtype=np.float64) for kind, length in (lengths or {}).items()},
            other_class,
            "the gold answers were not given" if is_gold is None else "",
        )

    @classmethod
    def concatenate(cls, parts: Sequence[ChoiceScores]) -> ChoiceScores:
        """Pool the documents of several tasks scored by the same members; a length that one lacks, all lack."""
        width = max(part.loglikelihoods.shape[2] for part in parts)
        known = set.intersection(*(set(part.lengths) for part in parts))
        golds = [part.is_gold for part in parts if part.is_gold is not None]
        return cls(
            np.concatenate([widen(part.loglikelihoods, width, -np.inf) for part in parts], axis=1),
            np.concatenate([part.counts for part in parts]),
            np.concatenate([widen(g, width) for g in golds]) if len(golds) == len(parts) else None,
            np.concatenate([part.subjects for part in parts]),
            np.concatenate([part.documents for part in parts]),
            np.concatenate([part.folds for part in parts]),
            {
                kind: np.concatenate([widen(part.lengths[kind], width) for part in parts])
                for kind in sorted(known)
            },
            parts[0].other_class,
            next((part.missing_gold for part in parts if part.is_gold is None), ""),
        )


def scale(log_p: FloatArray, temperature: npt.ArrayLike) -> FloatArray:
    """Return ``softmax(log p / T)`` as log-probabilities (N, D, C).

    Args:
        log_p: (N, D, C), nats.
        temperature: T, of shape (), (D,), (N, 1) or (N, D).

    Raises:
        EnsembleError: a temperature that is not a positive number.
    """
    t = np.asarray(temperature, dtype=np.float64)
    if not (np.isfinite(t) & (t > 0)).all():
        raise EnsembleError("a temperature must be a positive number")
    return log_choice_probabilities(log_p / np.broadcast_to(t, log_p.shape[:2])[..., None])
