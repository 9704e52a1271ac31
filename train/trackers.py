"""A run seen from outside: any tracker that accelerate knows (tensorboard, wandb, mlflow, …)."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lm_eval_lora_ensemble.errors import EnsembleError, first_line

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.folder import EnsembleFolder
    from lm_eval_lora_ensemble.train.recipe import Recipe

log = logging.getLogger(__name__)

PROJECT = "lora-ensemble"


class Trackers:
    """Logs losses and validation measures to the trackers that ``report_to`` names; a context manager.

    Local files go to ``<output>/.logs``. Under ``accelerate launch`` the first process reports its members.

    Raises:
        EnsembleError: accelerate does not know a tracker, or it is not installed.
    """

    def __init__(self, recipe: Recipe, folder: EnsembleFolder) -> None:
        self.accelerator = None
        if not recipe.report_to:
            return
        from accelerate import Accelerator

        logs = folder.path / ".logs"
        try:
            self.accelerator = Accelerator(log_with=list(recipe.report_to), project_dir=str(logs))
            if not self.accelerator.log_with:
                raise ValueError("no such tracker is installed")
            values = recipe.as_mapping()
            # Trackers take plain values only.
            config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in values.items()}
            self.accelerator.init_trackers(PROJECT, config=config)
        except (ValueError, ImportError) as error:
            raise EnsembleError(
                f"report_to={','.join(recipe.report_to)}: {first_line(error)}; "
                "name trackers that accelerate knows and install them, for example `pip install tensorboard`"
            ) from error
        log.info("Tracking in %s", logs)

    def losses(self, losses: dict[str, float], learning_rate: float, step: int) -> None:
        """Log one step's training losses."""
        values = {f"loss/{name}": loss for name, loss in losses.items()}
        self._log(values | {"learning_rate": learning_rate}, step)

    def measures(self, records: dict[str, dict[str, Any]], step: int) -> None:
        """Log one epoch's validation measures of each member."""
        self._log(
            {
                f"{measure}/{name}": value
                for name, record in records.items()
                for measure, value in record.items()
                if measure in {"acc", "nll", "ece"}
            },
            step,
        )

    def _log(self, values: dict[str, float], step: int) -> None:
        if self.accelerator is not None and values:
            self.accelerator.log(values, step=step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.accelerator is not None:
            self.accelerator.end_training()
