"""What a sweep evaluates, written beside its results so that one folder never mixes two sweeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.disk import refuse_file, write_json
from lm_eval_lora_ensemble.ensemble import manifest
from lm_eval_lora_ensemble.ensemble.members import Ensemble, find_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError

FILE_NAME = "sweep.json"

_LAST_EPOCH = 100_000  # a slip of the finger would fill the memory


@dataclass(frozen=True)
class SweepPlan:
    """The settings that every epoch of a sweep shares.

    Attributes:
        adapters: the ensemble folder.
        tasks: lm-eval tasks, in-domain ones first.
        ood: those of them that are out-of-domain.
        members: use only the first N; None for all.
        num_fewshot: as lm-eval's; None for the tasks' own.
        limit: documents of each task; None for all.
        model_args: further arguments of the backend, such as ``dtype``.
    """

    adapters: str
    tasks: tuple[str, ...]
    ood: tuple[str, ...] = ()
    members: int | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    model_args: Mapping[str, Any] | None = None

    def ensembles(self, epochs: str | None) -> dict[int, Ensemble]:
        """Find the members of every epoch before anything is loaded.

        Args:
            epochs: as ``0..5`` or ``0,2,4``; None for the prior and every epoch that is kept.

        Raises:
            EnsembleError: an epoch that some member lacks, or no epochs that can be read from the text.
        """
        numbers = parse_epochs(epochs) if epochs else kept_epochs(Path(self.adapters))
        given = self.model_args or {}
        return {
            epoch: find_ensemble(
                self.adapters,
                pretrained=given.get("pretrained"),
                members=self.members,
                epoch=epoch,
                allow_base_mismatch=bool(given.get("allow_base_mismatch", False)),
            )
            for epoch in numbers
        }

    def claim(self, output: Path, ensembles: Mapping[int, Ensemble]) -> None:
        """Make ``output`` this sweep's folder.

        Raises:
            EnsembleError: as :meth:`check`.
        """
        content = self.check(output, ensembles)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / FILE_NAME, content)

    def check(self, output: Path, ensembles: Mapping[int, Ensemble]) -> dict[str, Any]:
        """Return what ``output`` would say of itself as this sweep's folder.

        Raises:
            EnsembleError: the folder holds a sweep of other settings or another ensemble, or other files.
        """
        settings = json.loads(json.dumps(asdict(self)))
        fingerprints = {str(epoch): ensemble.fingerprint for epoch, ensemble in ensembles.items()}
        file = output / FILE_NAME
        refuse_file(output, f"--output {output}")
        if file.is_file():
            try:
                written = json.loads(file.read_text(encoding="utf-8"))
                settings_before, fingerprints_before = (
                    dict(written["settings"]),
                    dict(written["fingerprints"]),
                )
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise EnsembleError(f"{file} cannot be read ({error}); name a new --output") from error
            differing = [key for key, value in settings.items() if settings_before.get(key) != value]
            differing += [
                f"epoch {epoch}'s adapters"
                for epoch, value in fingerprints.items()
                if fingerprints_before.get(epoch, value) != value
            ]
            if differing:
                raise EnsembleError(
                    f"{output} holds a sweep with other {' and '.join(differing)}; name a new --output"
                )
            fingerprints = {**fingerprints_before, **fingerprints}
        # another process of this sweep may be writing sweep.json this very moment, under a hidden name
        elif output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir()):
            raise EnsembleError(f"{output} holds other files; name a new or empty folder as --output")
        return {"settings": settings, "fingerprints": fingerprints}


def parse_epochs(text: str) -> list[int]:
    """Read ``0..5``, ``3`` or ``0,2,4..6`` as ascending epochs.

    Raises:
        EnsembleError: anything else.
    """
    numbers: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("..")
            span = range(int(first), int(last or first) + 1)
            if not span or span[0] < 0 or span[-1] > _LAST_EPOCH:
                raise ValueError(part)
            numbers.update(span)
    except ValueError as error:
        raise EnsembleError(
            f"--epochs {text}: give epochs as 0..5 or 0,2,4 (0 is the prior), none above {_LAST_EPOCH:,}"
        ) from error
    return sorted(numbers)


def kept_epochs(folder: Path) -> list[int]:
    """Return the prior's 0 and the epochs that every member of an ensemble folder kept.

    Raises:
        EnsembleError: there is no such folder, or it has no manifest to tell.
    """
    place = folder.expanduser()
    if not place.is_dir():
        raise EnsembleError(f"no ensemble folder {place} here ({Path.cwd()}); check the path")
    if not (place / manifest.FILE_NAME).is_file():
        raise EnsembleError(f"{place} has no {manifest.FILE_NAME}; say which epochs with --epochs 0..E")
    kept = [set(entry.epochs) for entry in manifest.Manifest.read(place).members]
    return sorted({0, *set.intersection(*kept)}) if kept else [0]
