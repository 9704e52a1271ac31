"""metrics.jsonl: the members' records and measures of the ensemble, put together from the members' files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from lm_eval_lora_ensemble.disk import writing

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.folder import EnsembleFolder
    from lm_eval_lora_ensemble.train.validation import Validation


def assemble(folder: EnsembleFolder, validation: Validation | None) -> None:
    """Write metrics.jsonl as far as every member has come.

    A pure function of the members' files: whichever process calls it last leaves the same content.

    Args:
        folder: the ensemble's folder.
        validation: the validation set, None where the task has none.
    """
    with writing(folder.path), FileLock(folder.scratch / "metrics.lock"):
        records = {name: folder.read_records(name) for name in folder.names}
        lines = []
        for epoch in range(max(map(len, records.values()))):
            present = {name: _record(of_member, epoch) for name, of_member in records.items()}
            if any(record is None for record in present.values()):
                break
            lines.append(_line(folder, validation, epoch, present))
        folder.write_metrics(lines)


def _record(records: list[dict[str, Any]], epoch: int) -> dict[str, Any] | None:
    """Return a member's record of an epoch, its last one if it stopped early, None if it is not there yet."""
    if epoch < len(records):
        return records[epoch]
    return records[-1] if records and records[-1].get("stopped") else None


def _line(
    folder: EnsembleFolder, validation: Validation | None, epoch: int, members: dict[str, Any]
) -> dict[str, Any]:
    ensemble = None
    if validation:
        lls = [np.load(folder.validation_file(name, record["epoch"])) for name, record in members.items()]
        ensemble = validation.ensemble_measures(np.stack(lls))
    return {
        "epoch": epoch,
        "step": max(record["step"] for record in members.values()),
        "members": members,
        "ensemble": ensemble,
    }
