"""LoRA ensembles for lm-evaluation-harness, and how far their probabilities can be trusted.

The command is ``lm_eval --model lora-ensemble``. From Python::

    from lm_eval_lora_ensemble import load_runs, evaluate, compare, metrics, figures, load_ensemble, draw

``load_runs`` reads what lm-eval saved, ``evaluate`` and ``compare`` compute every metric with its interval,
``metrics`` are the same as functions of arrays, ``figures`` draw them, ``load_ensemble`` scores texts with every
member, and ``draw`` makes members of one adapter. Importing this package imports neither torch nor lm-eval; each name
loads what it needs when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval_lora_ensemble import figures, metrics
    from lm_eval_lora_ensemble.analysis.comparison import compare
    from lm_eval_lora_ensemble.analysis.evaluation import evaluate
    from lm_eval_lora_ensemble.analysis.runs import load_runs
    from lm_eval_lora_ensemble.harness.loaded import load_ensemble
    from lm_eval_lora_ensemble.posterior.draw import draw

    __version__: str

__all__ = ["__version__", "compare", "draw", "evaluate", "figures", "load_ensemble", "load_runs", "metrics"]

# public name -> the module that defines it; the two rooms are sub-packages under their own names
_HOMES = {
    "compare": "analysis.comparison",
    "draw": "posterior.draw",
    "evaluate": "analysis.evaluation",
    "load_ensemble": "harness.loaded",
    "load_runs": "analysis.runs",
}
_ROOMS = ("figures", "metrics")


def __getattr__(name: str) -> Any:
    """Load a public name when it is asked for: start-up must stay quick."""
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("lm-eval-lora-ensemble")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
