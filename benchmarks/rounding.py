"""What half precision costs: distances from a float32 pass, of ``hf`` and of the ensemble, over the same requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Distances:
    """Absolute differences of the first member's scores from float32, in nats.

    Attributes:
        requests: how many.
        hf_mean, hf_p99: of ``hf`` in half precision.
        ours_mean, ours_p99: of the ensemble in half precision.
    """

    requests: int
    hf_mean: float
    hf_p99: float
    ours_mean: float
    ours_p99: float

    def __str__(self) -> str:
        """Return one line."""
        mean, p99 = self.ours_mean / self.hf_mean, self.ours_p99 / self.hf_p99
        return (
            f"distance from float32 over {self.requests} requests, nats: "
            f"hf mean {self.hf_mean:.4f}, 99th percentile {self.hf_p99:.4f}; "
            f"ours {self.ours_mean:.4f} ({mean:.2f} ×), {self.ours_p99:.4f} ({p99:.2f} ×)"
        )

    def as_mapping(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


def distances(
    requests: list[Any],
    load_exact: Callable[[], Any],
    load_hf: Callable[[], Any],
    load_ours: Callable[[], Any],
) -> Distances:
    """Score the same requests three ways: ``hf`` in float32, ``hf`` and the ensemble in half precision."""
    exact = np.array([score for score, _ in load_exact()._loglikelihood_tokens(requests, disable_tqdm=True)])
    hf = np.array([score for score, _ in load_hf()._loglikelihood_tokens(requests, disable_tqdm=True)])
    ours = np.array(
        [score.members[0] for score, _ in load_ours()._loglikelihood_tokens(requests, disable_tqdm=True)]
    )
    hf_error, our_error = np.abs(hf - exact), np.abs(ours - exact)
    return Distances(
        len(requests),
        float(hf_error.mean()),
        float(np.percentile(hf_error, 99)),
        float(our_error.mean()),
        float(np.percentile(our_error, 99)),
    )
