"""One number for lm-eval, N numbers for everything that follows: the ensemble's loglikelihood."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

Average = Literal["probability", "loglikelihood"]
AVERAGES: tuple[str, ...] = get_args(Average)


class Score(NamedTuple):
    """The answer to one request.

    Attributes:
        loglikelihoods: float64 [N], each member's sum of float32 token log-probabilities, in nats.
        is_greedy: every target is the argmax of the mixture's next-token distribution, members weighted
            by their likelihood of the continuation so far.
    """

    loglikelihoods: npt.NDArray[np.float64]
    is_greedy: bool


def log_mean_exp(loglikelihoods: npt.ArrayLike) -> float:
    """Return ``log((1/N) Σ_m exp(l_m))`` over the first axis of ``loglikelihoods`` [N], in nats.

    The loglikelihood of the Bayesian model average with equal weights (arXiv 2402.12264, eq. 2).
    All −inf gives −inf; any NaN gives NaN.
    """
    values = np.asarray(loglikelihoods, dtype=np.float64)
    peak = values.max()
    if not np.isfinite(peak):
        return float(peak)
    return float(peak + np.log(np.mean(np.exp(values - peak))))


class EnsembleLoglikelihood(float):
    """A float that is the ensemble's loglikelihood and carries its members'.

    lm-eval insists that a result is ``(float, bool)``; the member scores travel inside the float, through
    its filters, its cache (pickle), the gather between ranks, and copies.

    Attributes:
        members: float64 [N], each member's loglikelihood of the whole continuation, in nats. Read-only.
        tokens: how many targets the loglikelihoods are sums over; None where that was not recorded, as in caches
            of release 0.1.
    """

    __slots__ = ("members", "tokens")
    members: npt.NDArray[np.float64]
    tokens: int | None

    def __new__(
        cls, value: float, members: npt.ArrayLike, tokens: int | None = None
    ) -> EnsembleLoglikelihood:
        """Attach ``members`` and ``tokens`` to ``value``; use :meth:`average` to compute the value."""
        self = super().__new__(cls, value)
        self.members = np.array(members, dtype=np.float64, ndmin=1)
        self.members.setflags(write=False)
        self.tokens = tokens
        return self

    @classmethod
    def average(
        cls, members: npt.ArrayLike, how: Average = "probability", *, tokens: int | None = None
    ) -> EnsembleLoglikelihood:
        """Average members' loglikelihoods [N].

        Args:
            members: each member's loglikelihood of one continuation, in nats.
            how: ``probability`` for log-mean-exp, the Bayesian model average; ``loglikelihood`` for the
                arithmetic mean of the loglikelihoods, an (unnormalised) log-opinion pool.
            tokens: number of the continuation's targets.
        """
        value = (
            log_mean_exp(members)
            if how == "probability"
            else float(np.asarray(members, dtype=np.float64).mean())
        )
        return cls(value, members, tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (float(self), self.members, self.tokens)
