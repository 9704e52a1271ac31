"""A manifest for adapters from elsewhere: what is loaded of them, with checksums."""

from __future__ import annotations

from pathlib import Path

from lm_eval_lora_ensemble.disk import sha256
from lm_eval_lora_ensemble.ensemble.adapters.folder import CONFIG, WEIGHTS
from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME, Manifest, MemberEntry
from lm_eval_lora_ensemble.ensemble.members import Ensemble, Source, find_sources
from lm_eval_lora_ensemble.errors import EnsembleError


def require_listable(folder: Path) -> None:
    """Refuse what cannot have a manifest of its members.

    Args:
        folder: an ensemble folder, or a folder of adapter folders.

    Raises:
        EnsembleError: there is no such folder, it is a single adapter, or it leads to adapters outside.
    """
    if not folder.is_dir():
        raise EnsembleError(
            f"no folder {str(folder)!r} here ({Path.cwd()}); {FILE_NAME} lies beside the adapters, so they have to "
            "be in a folder of yours: `hf download NAME --local-dir FOLDER/member_00`"
        )
    if (folder / CONFIG).is_file() and not (folder / FILE_NAME).is_file():
        raise EnsembleError(
            f"{folder} is a single adapter; {FILE_NAME} lists adapters below it: move it one folder down, as "
            "FOLDER/member_00, and name FOLDER"
        )
    refuse_unfinished(folder)
    for source in find_sources(folder)[0]:
        _relative(source.folder, folder.resolve())


def refuse_unfinished(folder: Path) -> None:
    """Refuse a training run's folder without a manifest; a recipe beside an adapter is a finished member's.

    Raises:
        EnsembleError: it is one; the message names the command that goes on with it.
    """
    recipe = folder / "recipe.yaml"
    if recipe.is_file() and not any((folder / name).is_file() for name in (FILE_NAME, CONFIG)):
        raise EnsembleError(
            f"{folder} is a training run without {FILE_NAME}; go on with it (`lora-ensemble train {recipe}`), or, "
            f"where every member is done, write it: `lora-ensemble train {recipe} --complete`"
        )


def manifest_of(folder: Path, ensemble: Ensemble) -> Manifest:
    """Return a folder's manifest, or one that lists the adapters found in it.

    Args:
        folder: of which :func:`require_listable` thinks well.
        ensemble: all that :func:`.members.find_ensemble` found there.

    Raises:
        EnsembleError: the manifest is not readable.
    """
    if (folder / FILE_NAME).is_file():
        return Manifest.read(folder)
    entries = [_entry(source, folder.resolve()) for source in find_sources(folder)[0]]
    return Manifest(ensemble.base_model, ensemble.revision, entries)


def _entry(source: Source, root: Path) -> MemberEntry:
    epochs, steps = (
        {
            number: path
            for number, path in sorted(kept.items())
            if all((path / name).is_file() for name in (CONFIG, WEIGHTS))
        }
        for kept in (source.epochs, source.steps)
    )
    folders = source.folder, *epochs.values(), *steps.values()
    loaded = [folder / name for folder in folders for name in (CONFIG, WEIGHTS)]
    return MemberEntry(
        name=source.name,
        folder=_relative(source.folder, root),
        epochs={epoch: _relative(path, root) for epoch, path in epochs.items()},
        steps={step: _relative(path, root) for step, path in steps.items()},
        files={_relative(path, root): sha256(path) for path in loaded},
    )


def _relative(path: Path, root: Path) -> str:
    if not path.is_relative_to(root):
        raise EnsembleError(f"{path} lies outside {root}, whose {FILE_NAME} cannot list it; copy it there")
    return path.relative_to(root).as_posix()
