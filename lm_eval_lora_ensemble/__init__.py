"""LoRA ensembles for lm-evaluation-harness: ``lm_eval --model lora-ensemble``.

Importing this package imports neither torch nor lm-eval; each part loads what it needs when used.
"""

from __future__ import annotations

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """Read ``__version__`` from the installed metadata, and only when asked: start-up must stay quick."""
    if name == "__version__":
        from importlib.metadata import version

        return version("lm-eval-lora-ensemble")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
