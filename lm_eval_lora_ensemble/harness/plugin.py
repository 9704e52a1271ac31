"""How the plugin reaches lm-eval: a lazily loaded model name, and one more folder of tasks.

Called once lm-eval's own modules have executed, by the start-up hook (:mod:`.._autoload`) or by
``python -m lm_eval_lora_ensemble``. Nothing here imports torch.
"""

from __future__ import annotations

from lm_eval_lora_ensemble.disk import tasks_folder
from lm_eval_lora_ensemble.harness.patches import show_tasks_folder

MODEL_NAME = "lora-ensemble"
# Must name the module that defines the class: lm-eval compares this string with the class it loads.
MODEL_TARGET = "lm_eval_lora_ensemble.harness.model:LoraEnsembleLM"


def register_model() -> None:
    """Put the lazy name ``lora-ensemble`` into lm-eval's registry, unless lm-eval read our entry point."""
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=MODEL_TARGET)


def add_tasks_folder() -> None:
    """Let every ``TaskManager`` with default tasks see ours."""
    show_tasks_folder(tasks_folder)
