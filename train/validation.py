"""How good the members and the ensemble are after each epoch, on documents no member trained on.

metrics.jsonl is put together here from the members' own files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from lm_eval_lora_ensemble.disk import writing
from lm_eval_lora_ensemble.train.engine import Engine
from lm_eval_lora_ensemble.train.examples import Example
from lm_eval_lora_ensemble.train.layout import Layout
from lm_eval_lora_ensemble.train.order import round_up
from lm_eval_lora_ensemble.train.scale import SUMMED, ChoiceScale

if TYPE_CHECKING:
    import torch

    from lm_eval_lora_ensemble.train.folder import EnsembleFolder

FloatArray = npt.NDArray[np.float64]


class Validation:
    """A validation set and its measures.

    Args:
        examples: the documents.
        batch_size: documents a forward pass, for each member.
        use_tree: see :class:`Layout`.
        dtype: see :class:`Layout`.
        scale: of the scores whose softmax is measured.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        use_tree: bool,
        dtype: torch.dtype,
        scale: ChoiceScale = SUMMED,
    ) -> None:
        self.layout = Layout(examples, gold_only=False, use_tree=use_tree, dtype=dtype)
        self.batch_size = batch_size
        self.divisor = scale.as_array(examples)
        self.is_gold = np.zeros((len(examples), self.layout.choices), dtype=bool)
        for d, example in enumerate(examples):
            self.is_gold[d, list(example.gold)] = True

    def loglikelihoods(self, engine: Engine, members: Sequence[str]) -> FloatArray:
        """Return the members' loglikelihoods of every choice [N, D, C] in nats; −inf for a lacking choice."""
        lengths = np.asarray(self.layout.lengths())
        order = np.argsort(-lengths, kind="stable")
        result = np.full((len(members), *self.is_gold.shape), -np.inf)
        for i in range(0, len(order), self.batch_size):
            documents = order[i : i + self.batch_size]
            length = round_up(int(lengths[documents].max()))
            result[:, documents] = engine.loglikelihoods(
                self.layout, [int(d) for d in documents], length, members
            )
        return result

    def measures(self, lls: FloatArray) -> dict[str, float]:
        """Return acc, nll and ece of one distribution over choices.

        Args:
            lls: [D, C] loglikelihoods of one member.
        """
        from lm_eval_lora_ensemble.metrics.choices import choice_probabilities

        scores = lls / self.divisor
        return self._measures(scores, choice_probabilities(scores))

    def ensemble_measures(self, lls: FloatArray) -> dict[str, float]:
        """Return acc, nll, ece, predictive entropy and mutual information of the ensemble.

        Args:
            lls: [N, D, C] loglikelihoods of the members.
        """
        from lm_eval_lora_ensemble.metrics.choices import choice_probabilities, ensemble_probabilities
        from lm_eval_lora_ensemble.metrics.information import mutual_information, predictive_entropy

        p = choice_probabilities(lls / self.divisor)
        mixture = (np.logaddexp.reduce(lls, axis=0) - np.log(len(lls))) / self.divisor
        return self._measures(mixture, ensemble_probabilities(p)) | {
            "predictive_entropy": float(predictive_entropy(p).mean()),
            "mutual_information": float(mutual_information(p).mean()),
        }

    def _measures(self, scores: FloatArray, p: FloatArray) -> dict[str, float]:
        """Return acc by argmax of the scores (lm-eval's acc or acc_norm), nll and ece by the probabilities."""
        from lm_eval_lora_ensemble.metrics.calibration import expected_calibration_error

        documents = np.arange(len(p))
        correct = self.is_gold[documents, p.argmax(-1)]
        return {
            "acc": float(self.is_gold[documents, scores.argmax(-1)].mean()),
            "nll": float(-np.log((p * self.is_gold).sum(-1)).mean()),
            "ece": float(expected_calibration_error(p.max(-1), correct)),
        }


def assemble_metrics(folder: EnsembleFolder, validation: Validation | None) -> None:
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
