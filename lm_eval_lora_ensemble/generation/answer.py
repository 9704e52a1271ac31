"""One text for lm-eval, N members' view of it for everything that follows: the ensemble's answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lm_eval_lora_ensemble.generation.measures import answer_measures

Ended = Literal["end_token", "stop_string", "length"]

_DIGITS = 6


@dataclass(frozen=True, eq=False)
class Trace:
    """What was seen while a text was decoded, token by token.

    Attributes:
        tokens: int [T], generated token ids, the end token included if there was one.
        log_probs: float [T], of the distribution that was decoded from, before temperature and the like.
        total, data: float [T], see :mod:`.measures`.
        effective: float [T], the effective number of members, 1 / Σ w².
        members: float [N, T], each member's log-probability of each token.
        ended: by an end token, by a stop string, or for want of further tokens.
    """

    tokens: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float64]
    total: npt.NDArray[np.float64]
    data: npt.NDArray[np.float64]
    effective: npt.NDArray[np.float64]
    members: npt.NDArray[np.float64]
    ended: Ended

    def part(self, start: int, stop: int) -> Trace:
        """Return the trace of tokens ``start`` to ``stop``."""
        return Trace(
            tokens=self.tokens[start:stop],
            log_probs=self.log_probs[start:stop],
            total=self.total[start:stop],
            data=self.data[start:stop],
            effective=self.effective[start:stop],
            members=self.members[:, start:stop],
            ended=self.ended,
        )

    def ended_by(self, ended: Ended) -> Trace:
        """Return the same trace with another end."""
        return replace(self, ended=ended)

    def measures(self) -> Mapping[str, float]:
        """Return :func:`~.measures.answer_measures` of these tokens."""
        return answer_measures(self.members, self.log_probs, self.total, self.data)


class EnsembleText(str):
    """A string that is the ensemble's answer and carries how sure the ensemble is of it.

    lm-eval takes texts; the trace travels inside one, through its cache (pickle) and the gather between ranks, in
    ``Instance.resps``, which filters leave alone. What filters make of it is a plain string.

    Attributes:
        trace: of the tokens that the text consists of, and of the one that ended it; None of a text that somebody
            else made, such as the target that lm-eval casts to its answer's type.
        pieces: text of each of these tokens.
        skipped: number of tokens generated before the answer, a thought that lm-eval takes away.
    """

    __slots__ = ("pieces", "skipped", "trace")
    trace: Trace | None
    pieces: tuple[str, ...]
    skipped: int

    def __new__(
        cls, text: object = "", trace: Trace | None = None, pieces: Sequence[str] = (), skipped: int = 0
    ) -> EnsembleText:
        """Attach ``trace`` to ``text``."""
        self = super().__new__(cls, text)
        self.trace, self.pieces, self.skipped = trace, tuple(pieces), skipped
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.trace, self.pieces, self.skipped)

    def to_dict(self) -> dict[str, Any]:
        """Return what a sample logs, as JSON values: nats, rounded to 1e-6.

        Raises:
            ValueError: the text carries no trace.
        """
        trace = self.trace
        if trace is None:
            raise ValueError("the text carries no trace")
        return {
            "text": str(self),
            "ended": trace.ended,
            "skipped_tokens": self.skipped,
            **{name: _rounded(value) for name, value in trace.measures().items()},
            "members": [_rounded(value) for value in trace.members.sum(axis=1)],
            "tokens": {
                "text": list(self.pieces),
                "id": trace.tokens.tolist(),
                "log_prob": _list(trace.log_probs),
                "total": _list(trace.total),
                "data": _list(trace.data),
                "mutual_information": _list(np.maximum(trace.total - trace.data, 0.0)),
                "effective_members": _list(trace.effective),
            },
        }


def _rounded(value: float) -> float | None:
    """Round; None for what strict JSON cannot hold."""
    return round(float(value), _DIGITS) if np.isfinite(value) else None


def _list(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [_rounded(value) for value in values]
