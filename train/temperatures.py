"""The temperatures that training leaves in ensemble.json: a pure function of the finished members' files."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_lora_ensemble.ensemble.calibration import Calibration, fit_calibration, in_words
from lm_eval_lora_ensemble.errors import EnsembleError

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.examples import Data
    from lm_eval_lora_ensemble.train.folder import EnsembleFolder

log = logging.getLogger(__name__)


def describe(data: Data) -> dict[str, Any]:
    """Return what a fit needs to know of validation documents besides their loglikelihoods."""
    examples = data.validation
    lengths = [[choice.characters for choice in example.choices] for example in examples]
    known = all(all(of_document) for of_document in lengths)
    return {
        "evaluated": list(data.evaluated),
        "golds": [list(example.gold) for example in examples],
        "characters": lengths if known else None,
    }


def final_epoch(records: Sequence[dict[str, Any]], *, best: bool) -> int:
    """Return the epoch whose adapter is a finished member's final one.

    Args:
        records: the member's, one an epoch from 0 on.
        best: whether that is the epoch of the lowest validation NLL, the first of several, or the last one.
    """
    trained = [record for record in records if record["epoch"]]
    measured = [record for record in trained if "nll" in record]
    if best and measured:
        return int(min(measured, key=lambda record: record["nll"])["epoch"])
    return int(trained[-1]["epoch"])


def fit_temperatures(folder: EnsembleFolder) -> Calibration | None:
    """Fit the temperatures of finished members on their validation documents; None, and a line in the log, without.

    Args:
        folder: of which every member is done.
    """
    described = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in folder.names
        if (path := folder.documents_file(name)).is_file()
    }
    reason = _why_none(list(described.values()), len(folder.names))
    if reason is None:
        try:
            return _fit(folder, described[folder.names[0]])
        except EnsembleError as error:
            reason = str(error)
    log.info("No temperature is fitted: %s; `lora-ensemble calibrate %s TASK` fits one", reason, folder.path)
    return None


def _why_none(described: Sequence[dict[str, Any]], members: int) -> str | None:
    """Say why what the members were measured on gives no temperature, or None if it does."""
    if not described:
        return "no validation documents were measured"
    if len(described) < members or any(other != described[0] for other in described):
        return "the members were not all measured on the same validation documents"
    evaluated = ", ".join(described[0]["evaluated"])
    return f"lm-eval evaluates {evaluated} on the validation split itself" if evaluated else None


def _fit(folder: EnsembleFolder, documents: dict[str, Any]) -> Calibration:
    best = folder.recipe.early_stopping is not None
    epochs = {name: final_epoch(folder.read_records(name), best=best) for name in folder.names}
    lls = np.stack([np.load(folder.validation_file(name, epoch)) for name, epoch in epochs.items()])
    is_gold = np.zeros(lls.shape[1:], dtype=bool)
    lengths = np.ones(lls.shape[1:], dtype=np.int64)
    characters = documents["characters"]
    for d, golds in enumerate(documents["golds"]):
        is_gold[d, golds] = True
        if characters:
            lengths[d, : len(characters[d])] = characters[d]
    calibration = fit_calibration(
        ",".join(folder.recipe.task), "validation", lls, is_gold, lengths if characters else None
    )
    for line in in_words(calibration):
        log.info("%s", line)
    return calibration
