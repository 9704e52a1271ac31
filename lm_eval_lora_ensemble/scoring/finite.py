"""A score that is not a number ends the run, named: nothing computed from it could be believed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.errors import EnsembleError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class NonFiniteScoreError(EnsembleError):
    """A member's loglikelihood is NaN or infinite.

    A log-softmax in float32 of finite logits is finite, so −inf too means that the logits were not.

    Attributes:
        index: of the request among those given to the scorer.
        reason: which member gave what, and what to do about it.
    """

    def __init__(self, index: int, reason: str, place: str = "") -> None:
        self.index = index
        self.reason = reason
        super().__init__(f"{place or f'request {index}'}: {reason}")

    def of(self, request: Instance) -> NonFiniteScoreError:
        """Return the same error with the task and document that the request belongs to."""
        return NonFiniteScoreError(
            self.index,
            self.reason,
            f"task {request.task_name}, document {request.doc_id}, request {request.idx}",
        )


def refuse_nonfinite_score(
    index: int, loglikelihoods: npt.NDArray[np.float64], names: Sequence[str], dtype: object
) -> None:
    """Refuse a request's scores if any is not finite.

    Args:
        index: of the request.
        loglikelihoods: float64 [N], the members' loglikelihoods of it, in nats.
        names: the members' names [N].
        dtype: what the model computes in.

    Raises:
        NonFiniteScoreError: a score is NaN or infinite.
    """
    wrong = np.flatnonzero(~np.isfinite(loglikelihoods))
    if not len(wrong):
        return
    also = f" (and {len(wrong) - 1} more members)" if len(wrong) > 1 else ""
    way_out = (
        "check that member's weights with `lora-ensemble check`, or leave it out"
        if "float32" in str(dtype)
        else "run with dtype=float32, and if that does not help check the member's weights with `lora-ensemble check`"
    )
    raise NonFiniteScoreError(
        index,
        f"{names[wrong[0]]}{also} gives a loglikelihood of {loglikelihoods[wrong[0]]} in {dtype}; {way_out}",
    )
