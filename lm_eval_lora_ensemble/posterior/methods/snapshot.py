"""Snapshot ensembles: what training passed on its way, as members (Huang 2017, arXiv 1704.00109)."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.contract import AdapterState, ListedPosterior, Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.options import Option
from lm_eval_lora_ensemble.posterior.registry import method


class SnapshotPosterior(ListedPosterior):
    """Some snapshots of one run, each with the same weight.

    Args:
        snapshots: the one to have if only one is wanted first.
        every: which of them they are, for the manifest.
    """

    def __init__(self, snapshots: Sequence[SourceAdapter], every: int) -> None:
        self.snapshots = snapshots
        self.config = snapshots[0].config
        self.settings = {"every": every}

    def __len__(self) -> int:
        """How many there are."""
        return len(self.snapshots)

    def origin(self, number: int) -> SourceAdapter:
        """Return the snapshot that it is."""
        return self.snapshots[number]

    def take(self, number: int) -> AdapterState:
        """Return a snapshot bit for bit."""
        return {name: tensor.clone() for name, tensor in self.snapshots[number].state.items()}


@method(
    name="snapshot",
    title="snapshots of one run, from the last back",
    needs="snapshots",
    source="arXiv 1704.00109",
    options={"every": Option(1, "take every so manieth snapshot, counted from the last", minimum=1)},
)
def fit(source: Source, data: None, *, every: int) -> SnapshotPosterior:  # noqa: ARG001 - every method's signature
    """Take snapshots from the last one back; with ``draws=K`` the last K.

    Args:
        source: the snapshots of one run.
        data: none.
        every: take each ``every``-th.

    Raises:
        EnsembleError: fewer than two would be left.
    """
    taken = source.adapters[::-1][::every]
    if len(taken) < 2:
        raise EnsembleError(
            f"every={every} leaves one of the {len(source.adapters)} snapshots in {source.folder}; give a smaller "
            "number, or train with more kept (keep_snapshots)"
        )
    return SnapshotPosterior(taken, every)
