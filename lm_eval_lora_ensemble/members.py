"""Find the members of an ensemble, check that they belong together, and give the whole a fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble import manifest
from lm_eval_lora_ensemble.errors import EnsembleError

DEFAULT_FOLDER = "./ensemble"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class Member:
    """One LoRA adapter.

    Attributes:
        name: unique within the ensemble; PEFT's adapter name.
        folder: local folder that ``PeftModel.from_pretrained`` loads.
        sha256: of the adapter's configuration and weights together.
        seed: the seed it was trained with, where the ensemble's manifest tells.
    """

    name: str
    folder: Path
    sha256: str
    seed: int | None = None


@dataclass(frozen=True)
class Ensemble:
    """A base model and the members on it; no members means the base model alone, the prior.

    Attributes:
        base_model: Hub id or local folder, as the adapters name it.
        revision: of the base model, where known.
        members: in order; empty for ``epoch=0``.
        epoch: the epoch asked for, or None for the members' final adapters.
    """

    base_model: str
    revision: str | None
    members: tuple[Member, ...]
    epoch: int | None = None

    @property
    def fingerprint(self) -> str:
        """Sha256 over base model, revision, epoch and every member's checksum, in order."""
        identity = [self.base_model, self.revision, self.epoch, [member.sha256 for member in self.members]]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def find_ensemble(
    adapters: str | Path | Sequence[str | Path] | None = None,
    *,
    pretrained: str | None = None,
    members: int | None = None,
    epoch: int | None = None,
    allow_base_mismatch: bool = False,
) -> Ensemble:
    """Find and check an ensemble.

    Args:
        adapters: an ensemble folder, a folder of adapter folders, one adapter folder, a Hub id, or a list
            of adapter folders and Hub ids (also as one string, separated by ``;``). Default ``./ensemble``.
        pretrained: the base model; read from the adapters when left out.
        members: use only the first so many.
        epoch: take this epoch's adapter of every member; 0 is the base model alone.
        allow_base_mismatch: accept adapters that name another base model than ``pretrained``.

    Raises:
        EnsembleError: nothing was found, something found is no adapter, or the parts do not fit together.
    """
    sources, book = _sources(adapters)
    if members is not None:
        if not 1 <= members <= len(sources):
            raise EnsembleError(
                f"members={members}: {_where(adapters)} has {len(sources)} members; "
                f"give a number from 1 to {len(sources)}"
            )
        sources = sources[:members]
    entries = {entry.name: entry for entry in book.members} if book else {}
    final = [(name, folder, _read_config(folder)) for name, folder in sources]
    base = _common_base(final, pretrained, allow_base_mismatch)
    revision = book.revision if book else final[0][2].get("revision")
    if epoch == 0:
        return Ensemble(base, revision, (), epoch=0)
    found = []
    for name, folder, _ in final:
        chosen = folder if epoch is None else _epoch_folder(folder, entries.get(name), epoch)
        if epoch is not None:
            _read_config(chosen)
        seed = entries[name].seed if name in entries else None
        found.append(Member(name, chosen, _adapter_sha256(chosen), seed))
    return Ensemble(base, revision, tuple(found), epoch)


def _where(adapters: object) -> str:
    return f"adapters={adapters if adapters is not None else DEFAULT_FOLDER}"


def _sources(
    adapters: str | Path | Sequence[str | Path] | None,
) -> tuple[list[tuple[str, Path]], manifest.Manifest | None]:
    """Resolve the argument to (name, local folder) pairs, and the manifest where there is one."""
    given = DEFAULT_FOLDER if adapters is None else adapters
    if isinstance(given, str) and ";" in given:
        given = [part.strip() for part in given.split(";") if part.strip()]
    if not isinstance(given, (str, Path)):
        if not given:
            raise EnsembleError("adapters= is an empty list; name at least one adapter folder or Hub id")
        return [(f"member_{i:02d}", _local(item)) for i, item in enumerate(given)], None
    folder = Path(given).expanduser()
    if not folder.is_dir():
        if adapters is None:
            raise EnsembleError(
                f"no adapters given and no {DEFAULT_FOLDER} here ({Path.cwd()}); train one with "
                "`lora-ensemble train RECIPE.yaml` or name one with --model_args adapters=FOLDER"
            )
        return [("member_00", _local(given))], None
    folder = folder.resolve()
    if (folder / manifest.FILE_NAME).is_file():
        book = manifest.Manifest.read(folder)
        if not book.members:
            raise EnsembleError(f"{folder / manifest.FILE_NAME} lists no members; train the ensemble again")
        return [(entry.name, _inside(folder, entry.folder)) for entry in book.members], book
    if (folder / CONFIG).is_file():
        return [("member_00", folder)], None
    children = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [child for child in children if (child / CONFIG).is_file()]
    if not found:
        raise EnsembleError(
            f"no adapters in {folder}: neither {manifest.FILE_NAME} nor a sub-folder with {CONFIG}; "
            "train them with `lora-ensemble train RECIPE.yaml` or name another folder"
        )
    for child in children:
        if child not in found:
            raise EnsembleError(
                f"{child} has no {CONFIG}, so it is not an adapter; a missing member would silently make a "
                "smaller ensemble: remove that folder, or list the members to use in adapters="
            )
    return [(child.name, child) for child in found], None


def _inside(folder: Path, relative: str) -> Path:
    """Return ``folder/relative``, refusing a manifest that points out of its own folder."""
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder):
        raise EnsembleError(f"{folder / manifest.FILE_NAME} names {relative!r}, which lies outside {folder}")
    return path


def _local(item: str | Path) -> Path:
    """Return the local folder of one adapter; only what can be nothing but a Hub id is fetched."""
    path = Path(item).expanduser()
    if path.is_dir():
        return path.resolve()
    text = str(item)
    if not _HUB_ID.fullmatch(text) or Path(text.split("/", maxsplit=1)[0]).exists():
        raise EnsembleError(f"no adapter folder {text!r} here ({Path.cwd()}); check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=[CONFIG, WEIGHTS, "README.md"]))
    except (OSError, ValueError) as error:
        raise EnsembleError(
            f"{text!r} is no local folder and could not be had from the Hugging Face Hub "
            f"({type(error).__name__}); check the name, the network or HF_TOKEN"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    """Read an adapter's configuration, having checked that the folder is a LoRA adapter with weights."""
    path = folder / CONFIG
    if not path.is_file():
        raise EnsembleError(
            f"{folder} is not a PEFT adapter: it has no {CONFIG}; name the adapter's own folder"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EnsembleError(f"{path} is not readable JSON ({error}); export the adapter again") from error
    if not isinstance(config, dict) or not isinstance(config.get("base_model_name_or_path"), str):
        raise EnsembleError(f"{path} does not name its base model; add base_model_name_or_path to it")
    if not (folder / WEIGHTS).is_file():
        raise EnsembleError(
            f"{folder} has no {WEIGHTS}; save the adapter with safetensors (pickled weights are not loaded)"
        )
    return config


def _same_model(one: str, other: str) -> bool:
    """Whether two names mean the same model: equal, the same folder, or equal last parts (a local mirror)."""
    if one == other or Path(one).name == Path(other).name:
        return True
    return Path(one).exists() and Path(other).exists() and Path(one).resolve() == Path(other).resolve()


def _common_base(
    found: Sequence[tuple[str, Path, dict[str, Any]]], pretrained: str | None, allow_mismatch: bool
) -> str:
    """Return the base model all members name, which must be ``pretrained`` where that is given."""
    _, first_folder, first = found[0]
    base: str = first["base_model_name_or_path"]
    for _, folder, config in found[1:]:
        if not _same_model(base, config["base_model_name_or_path"]):
            raise EnsembleError(
                f"adapters of different base models: {first_folder} is on {base}, {folder} is on "
                f"{config['base_model_name_or_path']}; an ensemble needs one base"
            )
    if pretrained is None:
        return base
    if not allow_mismatch and not _same_model(base, pretrained):
        raise EnsembleError(
            f"the adapters were trained on {base}, not on pretrained={pretrained}; leave pretrained out, "
            "or say allow_base_mismatch=True if both are the same weights"
        )
    return pretrained


def _epoch_folder(folder: Path, entry: manifest.MemberEntry | None, epoch: int) -> Path:
    """Return the folder of one epoch's adapter of one member."""
    if entry:
        root = folder.parents[len(Path(entry.folder).parts) - 1]
        kept = {number: root / relative for number, relative in entry.epochs.items()}
    else:
        kept = {
            int(path.name.removeprefix("epoch_")): path
            for path in folder.glob("epoch_*")
            if path.name.removeprefix("epoch_").isdigit()
        }
    if epoch not in kept:
        there = ", ".join(map(str, sorted(kept))) or "none"
        raise EnsembleError(
            f"{folder} has no epoch {epoch}; kept epochs: {there} (0 is the base model alone)"
        )
    return kept[epoch]


def _adapter_sha256(folder: Path) -> str:
    """Return one checksum over an adapter's configuration and weights."""
    parts = [manifest.sha256(folder / name) for name in (CONFIG, WEIGHTS)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
