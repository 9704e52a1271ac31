"""How the plugin reaches lm-eval: a lazily loaded model name, and one more folder of tasks.

Called once lm-eval's own modules have executed, by the start-up hook (:mod:`._autoload`) or by
``python -m lm_eval_lora_ensemble``. Nothing here imports torch.
"""

from __future__ import annotations

import functools
from typing import Any

from lm_eval_lora_ensemble.disk import tasks_folder

MODEL_NAME = "lora-ensemble"
# Must name the module that defines the class: lm-eval compares this string with the class it loads.
MODEL_TARGET = "lm_eval_lora_ensemble.harness.model:LoraEnsembleLM"


def register_model() -> None:
    """Put the lazy name ``lora-ensemble`` into lm-eval's registry, unless lm-eval read our entry point."""
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=MODEL_TARGET)


def add_tasks_folder() -> None:
    """Let every ``TaskManager`` with default tasks see ours, after lm-eval's and before the user's own.

    Later folders win, so a user's task of the same name is the one that runs.
    """
    from lm_eval.tasks.manager import TaskManager

    original = TaskManager.__init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # positional order of TaskManager.__init__: verbosity, include_path, include_defaults, metadata
        names = ("verbosity", "include_path", "include_defaults", "metadata")
        kwargs.update(zip(names, args, strict=False))
        given = kwargs.get("include_path")
        if kwargs.get("include_defaults", True):
            theirs = given if isinstance(given, (list, tuple)) else [given] if given else []
            kwargs["include_path"] = [tasks_folder(), *theirs]
        original(self, **kwargs)
        self.include_path = given

    TaskManager.__init__ = init
