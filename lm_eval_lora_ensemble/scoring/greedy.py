"""Whether a continuation is what the mixture itself would say, token by token.

The mixture's next token after a prefix has probability ``Σ_m w_m p_m(v | prefix)`` with weights
``w_m ∝ exp(loglikelihood of the continuation so far under m)``: the chain rule applied to
``(1/N) Σ_m p_m(continuation)``. The answer needs every member's whole distribution only where bounds from each member's
most likely token leave it open.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]


def settle(
    of_target: FloatArray, top: FloatArray, top_token: IntArray, target: IntArray, before: FloatArray
) -> npt.NDArray[np.int8]:
    """Say of each target whether it is the mixture's argmax: 1 yes, 0 no, −1 not settled by the bounds.

    With q_m the probability of member m's top token a_m, p_m that of the target t and W_m = exp(before_m):

    * another token v has at least the share ``Σ_{m: a_m = v} W_m q_m``: if that of some v is more than the target's
      ``Σ_m W_m p_m``, the target is not the argmax;
    * it has at most ``Σ_{m: a_m = v} W_m q_m + Σ_{m: a_m ≠ v} W_m min(q_m, r_m)`` with ``r_m = 1 − q_m``, less ``p_m``
      where a_m is not the target; for a v that is no member's top token the first sum is empty. If that is less than
      the target's share for every v, the target is the argmax.

    Equal shares, and shares that rounding could turn round, are left open.

    Args:
        of_target: [N, K] log-probabilities of the targets.
        top: [N, K] log-probabilities of the members' top tokens.
        top_token: int [N, K].
        target: int [K].
        before: [N, K] loglikelihoods of the continuation before each target.
    """
    weight = np.exp(before - before.max(axis=0))
    p, q = (np.exp(np.asarray(x, dtype=np.float64)) for x in (of_target, top))
    agrees = top_token == target
    share = (weight * p).sum(axis=0)
    rest = np.clip(np.where(agrees, 1 - q, 1 - q - p), 0, None)
    at_most_elsewhere = weight * np.minimum(q, rest)
    # a rival that no member has on top
    most = at_most_elsewhere.sum(axis=0)
    least = np.zeros_like(share)
    for member in range(len(top)):
        same = top_token == top_token[member]
        rival = ~agrees[member]
        on_top = (weight * q * same).sum(axis=0)
        least = np.maximum(least, np.where(rival, on_top, 0))
        most = np.maximum(most, np.where(rival, on_top + (at_most_elsewhere * ~same).sum(axis=0), 0))
    # shares are sums of float32 exponentials: 1e-5 is some ten times their rounding
    margin = 1e-5 * share
    settled = np.full(share.shape, -1, dtype=np.int8)
    settled[most < share - margin] = 1
    settled[least > share + margin] = 0
    settled[agrees.all(axis=0)] = 1
    return settled


class MixtureArgmax:
    """The mixture's next-token argmax at each position of some continuations, built up member by member.

    One buffer of [rows, V] serves any number of members.
    """

    def __init__(self) -> None:
        self._log_mixture: torch.Tensor | None = None

    def add(self, log_probs: torch.Tensor, log_weights: torch.Tensor) -> None:
        """Add one member.

        Args:
            log_probs: float32 [rows, V], the member's next-token log-probabilities.
            log_weights: float32 [rows], its loglikelihood of the continuation before each row.
        """
        weighted = log_probs + log_weights[:, None]
        if self._log_mixture is None:
            self._log_mixture = weighted
        else:
            torch.logaddexp(self._log_mixture, weighted, out=self._log_mixture)

    def matches(self, targets: torch.Tensor) -> torch.Tensor:
        """Return bool [rows]: the row's target [rows] is the mixture's argmax."""
        if self._log_mixture is None:
            raise RuntimeError("no member was added")
        return self._log_mixture.argmax(dim=-1) == targets
