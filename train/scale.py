"""What the objective divides a choice's loglikelihood by, so that what is trained is what is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train.examples import Example

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.recipe import Recipe


@dataclass(frozen=True)
class ChoiceScale:
    """A document's scores are ``l(c) / (τ · length(c))``.

    Attributes:
        scores: ``sum``, of length 1, or ``chars``, of as many as the choice has characters.
        temperature: τ > 0.
    """

    scores: str = "sum"
    temperature: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe) -> ChoiceScale:
        """Return the recipe's scale."""
        return cls(recipe.choice_scores, recipe.choice_temperature)

    def divisors(self, example: Example) -> tuple[float, ...]:
        """Return ``τ · length(c)`` of a document's choices.

        Raises:
            EnsembleError: the scores are ``chars``, and the document's choices differ in their contexts or one
                has no character.
        """
        if self.scores == "sum":
            return (self.temperature,) * len(example.choices)
        lengths = [choice.characters for choice in example.choices]
        if None in lengths:
            raise EnsembleError(
                f"choice_scores=chars: the choices of {example.task} are in their contexts, so no answer has a "
                "length; use choice_scores=sum"
            )
        if 0 in lengths:
            raise EnsembleError(
                f"choice_scores=chars: choice {lengths.index(0)} of document {example.doc_id} of {example.task} "
                "is empty; use choice_scores=sum"
            )
        return tuple(self.temperature * length for length in lengths if length is not None)

    def as_array(self, examples: Sequence[Example]) -> npt.NDArray[np.float64]:
        """Return the divisors of a data set [D, C]; 1 for a choice that a document lacks."""
        result = np.ones((len(examples), max(len(example.choices) for example in examples)))
        for row, example in zip(result, examples, strict=True):
            row[: len(example.choices)] = self.divisors(example)
        return result


SUMMED = ChoiceScale()
"""Loglikelihoods as they are."""
