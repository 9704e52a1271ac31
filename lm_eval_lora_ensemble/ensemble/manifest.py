"""ensemble.json: what an ensemble folder says of itself, and the checksums that prove it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.disk import read_json, write_json
from lm_eval_lora_ensemble.ensemble.calibration import Calibration
from lm_eval_lora_ensemble.errors import EnsembleError

FILE_NAME = "ensemble.json"
SCHEMA_VERSION = 3
READABLE = (1, 2, 3)
"""Version 1, of release 0.1.0, has no calibration; version 2 neither kept steps, nor a method and what it drew from."""
MAX_BYTES = 16 << 20
_SETTINGS_SHOWN = 3


@dataclass(frozen=True)
class Provenance:
    """What a member was drawn from.

    Attributes:
        name: of the source's member, such as ``member_00``, or of its snapshot, ``member_00/epoch_02``.
        folder: where it was.
        sha256: of its configuration and weights together; over those of every snapshot where there are several.
    """

    name: str
    folder: str
    sha256: str


@dataclass(frozen=True)
class Method:
    """How the members of an ensemble were drawn.

    Attributes:
        name: in the registry of posteriors.
        settings: what was chosen or fitted, most telling first.
        options: everything that was asked for, defaults included.
        seed: of the draws.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check what came from a file."""
        if not (isinstance(self.name, str) and self.name.isprintable()):
            raise TypeError("the method's name is not printable text")
        if not (isinstance(self.settings, dict) and isinstance(self.options, dict)):
            raise TypeError("the method's settings are no object")

    def described(self) -> str:
        """Return name and settings in a few words, as in ``swag (scale 0.5, K 5)``.

        Example:
            >>> Method("swag", {"scale": 0.5, "K": 5, "anchors": {"split": "training"}}).described()
            'swag (scale 0.5, K 5)'
        """
        return described(self.name, self.settings)


def described(name: str, settings: Mapping[str, Any]) -> str:
    """Return a method and the first of its settings that are numbers or words; see :meth:`Method.described`."""
    telling = [
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in settings.items()
        if isinstance(value, (int, float, str))
    ][:_SETTINGS_SHOWN]
    return f"{name} ({', '.join(telling)})" if telling else name


@dataclass
class MemberEntry:
    """One member of the manifest.

    Attributes:
        name: ``member_00``, …; unique.
        folder: the member's final adapter, relative to the ensemble folder.
        seed: seed of its initialisation, data order and dropout.
        epochs: folder of each kept epoch's adapter by epoch (1, 2, …), relative to the ensemble folder.
        steps: folder of each kept optimiser step's adapter by step, relative to the ensemble folder.
        files: sha256 of every adapter file by its path relative to the ensemble folder.
        status: ``complete``, or what is missing.
        draw: the number of the draw from its source, from 0; None for members that were trained.
        provenance: what it was drawn from; None for members that were trained.
    """

    name: str
    folder: str
    seed: int | None = None
    epochs: dict[int, str] = field(default_factory=dict)
    steps: dict[int, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    status: str = "complete"
    draw: int | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        """Check what came from a file: these are names to print and paths to open."""
        kept = [*self.epochs.values(), *self.steps.values()]
        texts = [self.name, self.folder, *kept, *self.files, *self.files.values()]
        if self.provenance:
            texts += [self.provenance.name, self.provenance.folder, self.provenance.sha256]
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise TypeError(f"a name, path or checksum of member {self.name!r} is not printable text")
        if not (self.seed is None or isinstance(self.seed, int)):
            raise TypeError(f"the seed of member {self.name!r} is not a whole number")
        if not (self.draw is None or isinstance(self.draw, int)):
            raise TypeError(f"the draw of member {self.name!r} is not a whole number")

    def as_mapping(self) -> dict[str, Any]:
        """Return what a file says of it: nothing of steps, draw and provenance where there are none."""
        absent = {"steps": {}, "draw": None, "provenance": None}
        return {key: value for key, value in asdict(self).items() if absent.get(key, ...) != value}


def entry_of(raw: dict[str, Any]) -> MemberEntry:
    """Return a member's entry from what a file says of it; JSON has texts for the numbers of epochs and steps.

    Raises:
        TypeError, ValueError, AttributeError: it is none.
    """
    kept = {
        key: {int(number): folder for number, folder in raw.get(key, {}).items()}
        for key in ("epochs", "steps")
    }
    provenance = raw.get("provenance")
    return MemberEntry(**{**raw, **kept, "provenance": Provenance(**provenance) if provenance else None})


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
        method: how the members were drawn; None for members that were trained.
        schema_version: of what is written.
    """

    base_model: str
    revision: str | None
    members: list[MemberEntry]
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    status: str = "complete"
    calibration: Calibration | None = None
    method: Method | None = None
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
        values["members"] = [entry.as_mapping() for entry in self.members]
        values["method"] = asdict(self.method) if self.method else None
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
            entries = [entry_of(entry) for entry in raw.pop("members")]
            if len({entry.name for entry in entries}) < len(entries):
                raise ValueError("two members have the same name")
            calibration = raw.pop("calibration", None)
            if calibration is not None:
                calibration = Calibration.from_mapping(calibration)
            method = raw.pop("method", None)
            return cls(
                members=entries,
                calibration=calibration,
                method=Method(**method) if method is not None else None,
                **raw,
            )
        except EnsembleError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise EnsembleError(
                f"{path} is not a readable manifest ({type(error).__name__}: {error}); "
                "train the ensemble again, or name the adapter folders instead"
            ) from error
