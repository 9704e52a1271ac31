"""ensemble.json: what an ensemble folder says of itself, and the checksums that prove it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.disk import read_json, write_json
from lm_eval_lora_ensemble.ensemble.calibration import Calibration
from lm_eval_lora_ensemble.errors import EnsembleError

FILE_NAME = "ensemble.json"
SCHEMA_VERSION = 2
READABLE = (1, 2)
"""Version 1, of release 0.1.0, has no calibration."""
MAX_BYTES = 16 << 20


@dataclass
class MemberEntry:
    """One member of the manifest.

    Attributes:
        name: ``member_00``, …; unique.
        folder: the member's final adapter, relative to the ensemble folder.
        seed: seed of its initialisation, data order and dropout.
        epochs: folder of each kept epoch's adapter by epoch (1, 2, …), relative to the ensemble folder.
        files: sha256 of every adapter file by its path relative to the ensemble folder.
        status: ``complete``, or what is missing.
    """

    name: str
    folder: str
    seed: int | None = None
    epochs: dict[int, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    status: str = "complete"

    def __post_init__(self) -> None:
        """Check what came from a file: these are names to print and paths to open."""
        texts = [self.name, self.folder, *self.epochs.values(), *self.files, *self.files.values()]
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise TypeError(f"a name, path or checksum of member {self.name!r} is not printable text")
        if not (self.seed is None or isinstance(self.seed, int)):
            raise TypeError(f"the seed of member {self.name!r} is not a whole number")


@dataclass
class Manifest:
    """The whole of ensemble.json.

    Attributes:
        base_model: Hub id, or an absolute folder.
        revision: of the base model, where known.
        members: in order.
        recipe: what the members were trained by; empty for adapters from elsewhere.
        versions: of the packages that trained them.
        status: ``complete``, or what is missing.
        calibration: the members' fitted temperatures, where there are any.
        schema_version: of what is written.
    """

    base_model: str
    revision: str | None
    members: list[MemberEntry]
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    status: str = "complete"
    calibration: Calibration | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Check what came from a file and goes on to loading."""
        if not isinstance(self.base_model, str) or not isinstance(self.revision, (str, type(None))):
            raise TypeError("base_model or revision is no text")
        if self.calibration and self.calibration.n_members != len(self.members):
            raise ValueError(
                f"the calibration is of {self.calibration.n_members} members, not of {len(self.members)}"
            )

    def write(self, folder: Path) -> None:
        """Write ``folder/ensemble.json``, replacing an older one in one step."""
        calibration = {"calibration": self.calibration.as_mapping()} if self.calibration else {}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["members"] = [asdict(entry) for entry in self.members]
        write_json(folder / FILE_NAME, values | calibration)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the form of ``folder/ensemble.json``.

        Raises:
            EnsembleError: the file is absent, unreadable, of a newer schema, lacks a key, or names what is no text.
        """
        path = folder / FILE_NAME
        try:
            raw = read_json(path, MAX_BYTES, "a readable manifest")
            version = raw.pop("schema_version")
            if version not in READABLE:
                raise EnsembleError(
                    f"{path} has schema version {version}, this release reads {' and '.join(map(str, READABLE))}; "
                    "use the release of lm-eval-lora-ensemble that wrote it"
                )
            entries = [
                MemberEntry(**{**entry, "epochs": {int(k): v for k, v in entry.get("epochs", {}).items()}})
                for entry in raw.pop("members")
            ]
            if len({entry.name for entry in entries}) < len(entries):
                raise ValueError("two members have the same name")
            calibration = raw.pop("calibration", None)
            if calibration is not None:
                calibration = Calibration.from_mapping(calibration)
            return cls(members=entries, calibration=calibration, **raw)
        except EnsembleError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise EnsembleError(
                f"{path} is not a readable manifest ({type(error).__name__}: {error}); "
                "train the ensemble again, or name the adapter folders instead"
            ) from error
