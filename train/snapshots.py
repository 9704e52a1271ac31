"""Which steps' adapters are kept beside the epochs', for posteriors that are fitted to the course of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train.optimiser import swa_start_step

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.recipe import Recipe


def is_due(recipe: Recipe, step: int, total_steps: int) -> bool:
    """Whether the adapters after ``step`` steps are kept: every ``keep_snapshots``, counted from ``swa_start``."""
    if isinstance(recipe.keep_snapshots, str):
        return False
    since = step - (swa_start_step(recipe, total_steps) or 0)
    return since > 0 and since % recipe.keep_snapshots == 0


def refuse_late_start(recipe: Recipe, total_steps: int) -> None:
    """Refuse a run that would end before its constant rate begins, or before its first snapshot is kept.

    Raises:
        EnsembleError: it would.
    """
    start = swa_start_step(recipe, total_steps)
    if start is not None and start >= total_steps:
        raise EnsembleError(
            f"swa_start is {recipe.swa_start:g}, step {start}, and the run has {total_steps} steps; "
            "give an earlier step, or a share of the run such as 0.75"
        )
    if not isinstance(recipe.keep_snapshots, str) and (start or 0) + recipe.keep_snapshots > total_steps:
        since = f" from step {start} on" if start else ""
        raise EnsembleError(
            f"keep_snapshots is every {recipe.keep_snapshots} steps{since}, and the run has {total_steps} steps, "
            "so none would be kept; give fewer, or epoch"
        )
