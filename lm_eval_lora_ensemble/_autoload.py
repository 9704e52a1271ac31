"""What the start-up file runs: wait for lm-eval, then introduce the plugin to it.

Every Python process of the environment runs :func:`install`, so this module imports nothing but ``os`` and
``sys`` and registers nothing itself: it puts a finder on ``sys.meta_path`` that acts after lm-eval's own
modules have executed. Registering ``lora-ensemble`` any earlier would hide lm-eval's built-in models.
``LM_EVAL_LORA_ENSEMBLE_AUTOLOAD=0`` turns all of it off.
"""

from __future__ import annotations

import os
import sys

# lm-eval module -> function of plugin.py to call once that module has executed
_AFTER = {"lm_eval.models": "register_model", "lm_eval.tasks.manager": "add_tasks_folder"}


def _introduce(name: str) -> None:
    """Call the plugin's function for lm-eval module ``name``; a broken plugin must leave lm-eval usable."""
    try:
        from lm_eval_lora_ensemble import plugin

        getattr(plugin, _AFTER[name])()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with us, the host's import goes on
        print(f"lm-eval-lora-ensemble could not load and is left out: {error!r}", file=sys.stderr)


class _Finder:
    """Finds the modules of ``_AFTER`` with the other finders and extends how they execute."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        if name not in _AFTER:
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = find_spec and find_spec(name, path, target)
            if spec:
                execute = getattr(spec.loader, "exec_module", None)
                if execute:

                    def exec_module(module):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
                        execute(module)
                        _introduce(name)

                    spec.loader.exec_module = exec_module
                return spec
        return None


def install(*, even_if_disabled: bool = False) -> None:
    """Introduce the plugin to lm-eval as soon as lm-eval is imported; safe to call twice."""
    if os.environ.get("LM_EVAL_LORA_ENSEMBLE_AUTOLOAD") == "0" and not even_if_disabled:
        return
    if any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
    for name in _AFTER:
        if name in sys.modules:
            _introduce(name)
