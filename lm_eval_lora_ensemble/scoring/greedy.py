"""Whether a continuation is what the mixture itself would say, token by token."""

from __future__ import annotations

import torch


class MixtureArgmax:
    """The mixture's next-token argmax at each position of some continuations, built up member by member.

    The mixture's next token after a prefix has probability ``Σ_m w_m p_m(v | prefix)`` with weights
    ``w_m ∝ exp(loglikelihood of the continuation so far under m)``: the chain rule applied to
    ``(1/N) Σ_m p_m(continuation)``. One buffer of [rows, V] serves any number of members.
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
