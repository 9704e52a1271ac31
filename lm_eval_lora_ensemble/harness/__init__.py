"""Everything that subclasses, patches or registers with lm-eval.

Importing the package imports none of it: the start-up file needs :mod:`.plugin` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.harness.tasks import UncertaintyTask

__all__ = ["UncertaintyTask"]


def __getattr__(name: str) -> Any:
    """Load :class:`UncertaintyTask` when asked: this is the address that users' YAMLs know it by."""
    if name == "UncertaintyTask":
        from lm_eval_lora_ensemble.harness.tasks import UncertaintyTask

        return UncertaintyTask
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
