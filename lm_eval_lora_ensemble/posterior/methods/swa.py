"""Stochastic weight averaging: the mean of a run's snapshots as one member (Izmailov 2018, arXiv 1803.05407).

A and B are averaged each by itself, as plain parameters. The product of the means is not the mean of the products:
that one has a higher rank and would be another adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval_lora_ensemble.posterior.contract import AdapterState, ListedPosterior, Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.moments import last_of, mean_of
from lm_eval_lora_ensemble.posterior.options import Option
from lm_eval_lora_ensemble.posterior.registry import method

LAST = Option(None, "use only the last N snapshots; all of them by default", int, minimum=2)


class MeanPosterior(ListedPosterior):
    """All weight on the mean of some snapshots.

    Args:
        snapshots: of one run.
    """

    def __init__(self, snapshots: Sequence[SourceAdapter]) -> None:
        self.snapshots = snapshots
        self.config = snapshots[0].config
        self.settings = {"snapshots": len(snapshots)}

    def __len__(self) -> int:
        """There is one."""
        return 1

    def take(self, number: int) -> AdapterState:
        """Return the mean, in float32 or wider."""
        if number != 0:
            raise IndexError(number)
        names = self.snapshots[0].state
        return {name: mean_of([one.state[name] for one in self.snapshots]) for name in names}


@method(
    name="swa",
    title="mean of the snapshots of one run, one member",
    needs="snapshots",
    source="arXiv 1803.05407",
    options={"last": LAST},
)
def fit(source: Source, data: None, *, last: int | None) -> MeanPosterior:  # noqa: ARG001 - every method's signature
    """Average the snapshots of one run.

    Args:
        source: the snapshots.
        data: none.
        last: average only so many, the last ones.

    Raises:
        EnsembleError: fewer than two, or fewer than ``last``.
    """
    return MeanPosterior(last_of(source, last, at_least=2, method="swa"))
