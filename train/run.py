"""One training run: which members this process trains, where, and what is left to do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train.folder import EnsembleFolder, member_name

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.recipe import Recipe

log = logging.getLogger(__name__)


def train_members(recipe: Recipe, member: int | None = None) -> Path:
    """Train the members of a recipe, or go on with them, and return the ensemble's folder.

    Under ``accelerate launch`` each process trains its share of the members. The manifest is written by
    whichever process finishes last.

    Args:
        recipe: what to train.
        member: train this member only; for job arrays.

    Raises:
        EnsembleError: anything the user can mend.
    """
    folder = EnsembleFolder(recipe)
    folder.check_recipe()
    if folder.complete:
        log.info("%s is complete; nothing to do", folder.path)
        return folder.path
    state = _process_state(recipe)
    indices = _share(recipe, member, state.process_index, state.num_processes)
    names = [member_name(i) for i in indices if not folder.finished(member_name(i))]
    if names:
        from lm_eval_lora_ensemble.train import base
        from lm_eval_lora_ensemble.train.trainer import Trainer

        with folder.claim(names):
            seeds = {name: recipe.seed + folder.names.index(name) for name in names}
            Trainer(recipe, folder, seeds, base.pick_device(recipe.device)).run()
    if not folder.unfinished:
        _finish(folder)
    if state.num_processes > 1:
        state.destroy_process_group()
    return folder.path


def complete(recipe: Recipe) -> Path:
    """Write the manifest of an ensemble whose members are all done, and return its folder; train nothing.

    Args:
        recipe: the ensemble's recipe; its ``output`` is where the folder is now.

    Raises:
        EnsembleError: members are missing, or the folder is another recipe's.
    """
    folder = EnsembleFolder(recipe)
    folder.check_recipe()
    if folder.complete:
        log.info("%s is complete; nothing to do", folder.path)
        return folder.path
    if folder.unfinished:
        raise EnsembleError(
            f"{folder.path} still lacks {', '.join(folder.unfinished)}; give --member I instead of --complete for "
            "each, or neither to train what is left"
        )
    _finish(folder)
    return folder.path


def _finish(folder: EnsembleFolder) -> None:
    """Fit the members' temperatures and write the manifest, all members being done."""
    from lm_eval_lora_ensemble.train.base import resolve_name
    from lm_eval_lora_ensemble.train.temperatures import fit_temperatures

    folder.finish_run(resolve_name(folder.recipe.base_model), fit_temperatures(folder))


def _process_state(recipe: Recipe) -> Any:
    """Return accelerate's view of the processes; it reads what ``accelerate launch`` or torchrun set."""
    from accelerate import PartialState

    return PartialState(cpu=True) if recipe.device == "cpu" else PartialState()


def _share(recipe: Recipe, member: int | None, rank: int, processes: int) -> list[int]:
    """Return the members of this process: contiguous, the shares as equal as can be."""
    if member is None:
        return list(range(rank * recipe.members // processes, (rank + 1) * recipe.members // processes))
    if not 0 <= member < recipe.members:
        raise EnsembleError(
            f"--member {member}: the recipe has {recipe.members} members, 0 to {recipe.members - 1}"
        )
    return [member]
