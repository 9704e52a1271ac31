"""Complete an ensemble folder whose members were trained one by one, as job arrays do."""

from __future__ import annotations

from pathlib import Path

from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME as MANIFEST
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train import recipe as recipes
from lm_eval_lora_ensemble.train.folder import EnsembleFolder
from lm_eval_lora_ensemble.train.recipe import Recipe


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
