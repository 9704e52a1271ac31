"""Find the members of an ensemble, check that they belong together, and give the whole a fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lm_eval_lora_ensemble.ensemble import manifest
from lm_eval_lora_ensemble.ensemble.adapters.config import AdapterConfig
from lm_eval_lora_ensemble.ensemble.adapters.folder import (
    CONFIG,
    check_adapter,
    check_config,
    inside,
    link_root,
)
from lm_eval_lora_ensemble.ensemble.hub import at_hand, fetch
from lm_eval_lora_ensemble.errors import EnsembleError

DEFAULT_FOLDER = "./ensemble"
DRAWING = "draw.json"
"""What a folder of draws was asked for; without a manifest beside it, some are still to come."""


@dataclass(frozen=True)
class Member:
    """One LoRA adapter.

    Attributes:
        name: unique within the ensemble; PEFT's adapter name.
        folder: local folder that ``PeftModel.from_pretrained`` loads.
        sha256: of the adapter's configuration and weights together.
        seed: the seed it was trained with, where the ensemble's manifest tells.
        draw: the number of the draw that it is, where the manifest tells.
        provenance: what it was drawn from, where the manifest tells.
    """

    name: str
    folder: Path
    sha256: str
    seed: int | None = None
    draw: int | None = None
    provenance: manifest.Provenance | None = None


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


@dataclass(frozen=True)
class Source:
    """A place that should hold a member's adapter; nothing in it has been read.

    Attributes:
        name: as in :class:`Member`.
        folder: the member's final adapter, with links followed.
        root: the folder that no link in ``folder`` may leave.
        epochs: folder of each kept epoch's adapter.
        steps: folder of each kept optimiser step's adapter.
        entry: what the ensemble's manifest says of the member.
    """

    name: str
    folder: Path
    root: Path
    epochs: dict[int, Path]
    steps: dict[int, Path] = field(default_factory=dict)
    entry: manifest.MemberEntry | None = None


def find_ensemble(
    adapters: str | Path | Sequence[str | Path] | None = None,
    *,
    pretrained: str | None = None,
    members: int | None = None,
    epoch: int | None = None,
    allow_base_mismatch: bool = False,
) -> Ensemble:
    """Find an ensemble and check every file of it that will be loaded.

    Args:
        adapters: an ensemble folder, a folder of adapter folders, one adapter folder, the Hub id of an ensemble or an
            adapter (``org/name``, ``org/name@revision``), or a list of adapter folders and adapters' Hub ids (also as
            one string, separated by ``;``). Default ``./ensemble``.
        pretrained: the base model; read from the adapters when left out, so adapters that name none need it.
        members: use only the first N.
        epoch: take this epoch's adapter of every member; 0 is the base model alone.
        allow_base_mismatch: accept adapters that name another base model than ``pretrained``.

    Raises:
        EnsembleError: nothing was found, something found is no adapter, or the parts do not fit together.
    """
    sources, listed = find_sources(adapters, epoch=epoch)
    if members is not None:
        if not 1 <= members <= len(sources):
            raise EnsembleError(
                f"members={members}: {_where(adapters)} has {len(sources)} members; "
                f"give a number from 1 to {len(sources)}"
            )
        sources = sources[:members]
    if epoch == 0:
        configs = [check_config(source.folder, source.root) for source in sources]
        return Ensemble(*common_base(configs, listed, pretrained, allow_base_mismatch), (), epoch=0)
    checked = []
    configs = []
    for source in sources:
        folder = source.folder if epoch is None else _epoch_folder(source, epoch)
        adapter = check_adapter(folder, source.root)
        configs.append(adapter.config)
        said = source.entry or manifest.MemberEntry(source.name, source.name)
        checked.append(Member(source.name, folder, adapter.sha256, said.seed, said.draw, said.provenance))
    return Ensemble(*common_base(configs, listed, pretrained, allow_base_mismatch), tuple(checked), epoch)


def find_sources(
    adapters: str | Path | Sequence[str | Path] | None = None,
    *,
    epoch: int | None = None,
    everything: bool = False,
) -> tuple[list[Source], manifest.Manifest | None]:
    """Find where the members are, reading nothing of them, and the manifest where there is one.

    Args:
        adapters: as in :func:`find_ensemble`.
        epoch: of an ensemble on the Hub, the epoch whose adapters are downloaded besides the final ones.
        everything: of an ensemble on the Hub, download all that its manifest lists.

    Raises:
        EnsembleError: nothing was found, or something outside the folder that was given.
    """
    given = DEFAULT_FOLDER if adapters is None else adapters
    if isinstance(given, str) and ";" in given:
        given = [part.strip() for part in given.split(";") if part.strip()]
    if not isinstance(given, (str, Path)):
        if not given:
            raise EnsembleError("adapters= is an empty list; name at least one adapter folder or Hub id")
        return [_single(f"member_{i:02d}", item) for i, item in enumerate(given)], None
    if adapters is None and not Path(given).is_dir():
        raise EnsembleError(
            f"no adapters given and no {DEFAULT_FOLDER} here ({Path.cwd()}); train one with "
            "`lora-ensemble train RECIPE.yaml` or name one with --model_args adapters=FOLDER"
        )
    folder = Path(str(at_hand(given, epoch=epoch, everything=everything))).expanduser().resolve()
    if (folder / manifest.FILE_NAME).is_dir():
        raise EnsembleError(f"{folder / manifest.FILE_NAME} is a folder; a manifest is a file")
    if (folder / manifest.FILE_NAME).is_file():
        return _listed(folder)
    if (folder / CONFIG).is_file():
        return [_single("member_00", folder)], None
    return _children(folder), None


def _where(adapters: object) -> str:
    return f"adapters={adapters if adapters is not None else DEFAULT_FOLDER}"


def _single(name: str, item: str | Path) -> Source:
    folder = _local(item)
    root = link_root(folder)
    return Source(name, folder, root, _kept_in(folder, root, "epoch"), _kept_in(folder, root, "step"))


def _listed(folder: Path) -> tuple[list[Source], manifest.Manifest]:
    """Return the members that ``folder``'s manifest lists."""
    root = link_root(folder)
    inside(folder / manifest.FILE_NAME, root)
    listed = manifest.Manifest.read(folder)
    if not listed.members:
        raise EnsembleError(f"{folder / manifest.FILE_NAME} lists no members; train the ensemble again")
    sources = []
    for entry in listed.members:
        epochs, steps = (
            {number: _named_by_manifest(folder, path) for number, path in kept.items()}
            for kept in (entry.epochs, entry.steps)
        )
        sources.append(
            Source(entry.name, _named_by_manifest(folder, entry.folder), root, epochs, steps, entry)
        )
    return sources, listed


def _children(folder: Path) -> list[Source]:
    """Return the adapters in the sub-folders of ``folder``, each of which must be one."""
    if (folder / DRAWING).is_file():
        raise EnsembleError(
            f"{folder} holds draws that are not finished; run the same `lora-ensemble draw` again, which goes on "
            "from there, or name the adapter folders to use"
        )
    children = sorted(
        path for path in folder.iterdir() if _may_be_a_folder(path) and not path.name.startswith(".")
    )
    if not any((child / CONFIG).is_file() for child in children):
        raise EnsembleError(
            f"no adapters in {folder}: neither {manifest.FILE_NAME} nor a sub-folder with {CONFIG}; "
            "train them with `lora-ensemble train RECIPE.yaml` or name another folder"
        )
    root = link_root(folder)
    for child in children:
        if not child.name.isprintable():
            raise EnsembleError(f"{folder} holds a folder called {child.name!r}; give it a printable name")
        if not (child / CONFIG).is_file():
            raise EnsembleError(
                f"{child} has no {CONFIG}, so it is not an adapter; a missing member would silently make a "
                "smaller ensemble: remove that folder, or list the members to use in adapters="
            )
    return [
        Source(child.name, folder, root, _kept_in(folder, root, "epoch"), _kept_in(folder, root, "step"))
        for child, folder in ((child, inside(child, root)) for child in children)
    ]


def _may_be_a_folder(path: Path) -> bool:
    """Whether a path is a folder, or a link to what is not there: that may have been a member's."""
    return path.is_dir() or (path.is_symlink() and not path.exists())


def _named_by_manifest(folder: Path, relative: str) -> Path:
    """Return ``folder/relative``, refusing a manifest that points out of its own folder."""
    try:
        return inside(folder / relative, folder)
    except EnsembleError as error:
        raise EnsembleError(
            f"{folder / manifest.FILE_NAME} names {relative!r}, which lies outside {folder}"
        ) from error


def _local(item: str | Path) -> Path:
    """Return the local folder of one adapter; only what can be nothing but a Hub id is fetched."""
    path = Path(item).expanduser()
    return path.resolve() if path.is_dir() else fetch(str(item))


def _model_name(name: str) -> str:
    """Return what a base model is called, wherever it lies: ``org/model``, a mirror, a cache of a hub.

    Hugging Face's cache puts a model into ``models--org--model/snapshots/COMMIT``; ModelScope's cache writes
    ``___`` for the points in its name; and the path may come from Windows.
    """
    parts = re.split(r"[/\\]", name.rstrip("/\\"))
    cached = next((part for part in parts if part.startswith("models--")), None)
    return (cached.rpartition("--")[2] if cached else parts[-1]).replace("___", ".")


def same_model(one: str, other: str) -> bool:
    """Whether two names mean the same model: equal, the same folder, or called the same (a local mirror)."""
    if one == other or _model_name(one) == _model_name(other):
        return True
    return Path(one).exists() and Path(other).exists() and Path(one).resolve() == Path(other).resolve()


def common_base(
    configs: Sequence[AdapterConfig],
    listed: manifest.Manifest | None = None,
    pretrained: str | None = None,
    allow_mismatch: bool = False,
) -> tuple[str, str | None]:
    """Return the members' base model and its revision.

    Args:
        configs: the members', at least one.
        listed: the ensemble's manifest, where there is one.
        pretrained: the base model, which must be the one that the members name, if they name any.
        allow_mismatch: take ``pretrained`` whatever the members name.

    Raises:
        EnsembleError: they name different ones, or some name none and ``pretrained`` does not either.
    """
    named = _named_base(configs)
    revision = listed.revision if listed else configs[0].revision
    if pretrained is None:
        nameless = [config.path for config in configs if config.base_model is None]
        if nameless or named is None:
            raise EnsembleError(
                f"{nameless[0]} names no base model; give pretrained=, the Hub id or folder of the model that it "
                "was trained on"
            )
        return named, revision
    if named is not None and not allow_mismatch and not same_model(named, pretrained):
        raise EnsembleError(
            f"the adapters were trained on {named}, not on pretrained={pretrained}; leave pretrained "
            "out, or, in --model_args, say allow_base_mismatch=True if both are the same weights"
        )
    return pretrained, revision


def _named_base(configs: Sequence[AdapterConfig]) -> str | None:
    """Return the base model that all members name which name one; None if none does."""
    first, named = None, None
    for config in configs:
        if config.base_model is None:
            continue
        if first is None or named is None:
            first, named = config, config.base_model
        elif not same_model(named, config.base_model):
            raise EnsembleError(
                f"adapters of different base models: {first.path.parent} is on {named}, "
                f"{config.path.parent} is on {config.base_model}; an ensemble needs one base"
            )
    return named


def _kept_in(folder: Path, root: Path, unit: str) -> dict[int, Path]:
    """Return the folder of each adapter that training kept inside a member's own, by epoch or by step."""
    return {
        int(path.name.removeprefix(f"{unit}_")): inside(path, root)
        for path in folder.glob(f"{unit}_*")
        if path.name.removeprefix(f"{unit}_").isdecimal()
    }


def _epoch_folder(source: Source, epoch: int) -> Path:
    if epoch not in source.epochs:
        there = ", ".join(map(str, sorted(source.epochs))) or "none"
        raise EnsembleError(
            f"{source.folder} has no epoch {epoch}; kept epochs: {there} (0 is the base model alone)"
        )
    return source.epochs[epoch]
