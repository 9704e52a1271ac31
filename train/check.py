"""``lora-ensemble check FOLDER``: complete an ensemble folder, and verify it against its manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_eval_lora_ensemble.train import recipe as recipes
from lm_eval_lora_ensemble.train.folder import EnsembleFolder
from lm_eval_lora_ensemble.train.recipe import Recipe

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.manifest import FILE_NAME as MANIFEST
from lm_eval_lora_ensemble.manifest import Manifest, sha256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the ensemble's folder")


def run(arguments: argparse.Namespace) -> int:
    """Print what was verified; return 0.

    Raises:
        EnsembleError: members are missing, or a file is missing or changed.
    """
    folder = arguments.folder.expanduser().absolute()
    complete(folder)
    manifest = Manifest.read(folder)
    files = verify(folder, manifest)
    print(f"{folder}: {len(manifest.members)} members, {files} files, all as {MANIFEST} says")
    return 0


def complete(folder: Path) -> None:
    """Write the manifest of a folder whose members were trained one by one and are all done."""
    if (folder / MANIFEST).is_file():
        return
    if not (folder / recipes.FILE_NAME).is_file():
        raise EnsembleError(
            f"{folder} has neither {MANIFEST} nor {recipes.FILE_NAME}: no run of `train` made it"
        )
    written = Recipe.load(folder / recipes.FILE_NAME)
    # The folder may have been moved since it was begun.
    ensemble = EnsembleFolder(Recipe.from_mapping({**written.as_mapping(), "output": str(folder)}))
    missing = [name for name in ensemble.names if not ensemble.finished(name)]
    if missing:
        raise EnsembleError(
            f"{folder} still lacks {', '.join(missing)}; run `lora-ensemble train {folder / recipes.FILE_NAME} "
            "--member I` for each, or without --member for all"
        )
    from lm_eval_lora_ensemble.train.base import resolve_name

    ensemble.finish(resolve_name(written.base_model))


def verify(folder: Path, manifest: Manifest) -> int:
    """Compare every file of the manifest with its checksum and return their number."""
    files = {path: digest for member in manifest.members for path, digest in member.files.items()}
    missing = [path for path in files if not (folder / path).is_file()]
    changed = [path for path in files if path not in missing and sha256(folder / path) != files[path]]
    if missing or changed:
        first = f"{missing[0]} is missing" if missing else f"{changed[0]} has changed"
        raise EnsembleError(
            f"{folder}: {first} ({len(missing)} missing and {len(changed)} changed of {len(files)} files); "
            f"train again into another output=, or restore the folder from a copy"
        )
    return len(files)
