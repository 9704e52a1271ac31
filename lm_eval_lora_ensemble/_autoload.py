"""What the start-up file runs: wait for lm-eval, then introduce the plugin to it.

Every Python process of the environment runs :func:`install`, so this module imports nothing but ``os`` and
``sys`` and registers nothing itself: it puts a finder on ``sys.meta_path`` that acts after lm-eval's own
modules have executed. Registering ``lora-ensemble`` any earlier would hide lm-eval's built-in models.
``LM_EVAL_LORA_ENSEMBLE_AUTOLOAD=0`` turns all of it off.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as typing has it, without the cost of importing typing at every start
if TYPE_CHECKING:
    from typing import Any

# lm-eval module -> function of plugin.py to call once that module has executed
_AFTER = {"lm_eval.models": "register_model", "lm_eval.tasks.manager": "add_tasks_folder"}


def _introduce(name: str) -> None:
    """Call the plugin's function for lm-eval module ``name``; a broken plugin must leave lm-eval usable."""
    try:
        from lm_eval_lora_ensemble.harness import plugin

        getattr(plugin, _AFTER[name])()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with us, the host's import goes on
        print(f"lm-eval-lora-ensemble could not load and is left out: {error!r}", file=sys.stderr)


class _Finder:
    """Finds the modules of ``_AFTER`` with the other finders and extends how they execute."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _AFTER:
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = find_spec and find_spec(name, path, target)
            if spec:
                self._extend(spec.loader, name)
                return spec
        return None

    @staticmethod
    def _extend(loader: Any, name: str) -> None:
        """Let this one loader introduce the plugin once it has executed its module."""
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: Any) -> None:
            execute(module)
            _introduce(name)

        loader.exec_module = exec_module


def install(*, even_if_disabled: bool = False) -> None:
    """Introduce the plugin to lm-eval as soon as lm-eval is imported; safe to call twice."""
    if os.environ.get("LM_EVAL_LORA_ENSEMBLE_AUTOLOAD") == "0" and not even_if_disabled:
        return
    if any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _AFTER:
        if name in sys.modules:
            _introduce(name)
