"""Putting the adapters on the base model: every member whole, or one error that names it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safetensors import SafetensorError

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.members import Member


def load_adapter(model: Any, member: Member, name: str) -> None:
    """Load a further adapter beside those that a PEFT model has.

    Args:
        model: the ``PeftModel``.
        member: what to load.
        name: PEFT's name for it.

    Raises:
        EnsembleError: PEFT cannot load it, or its weights lack a matrix that its configuration asks for.
    """
    with loading(member):
        result = model.load_adapter(str(member.folder), adapter_name=name)
        if result.missing_keys:
            raise KeyError(f"no weights for {result.missing_keys[0]}")


@contextlib.contextmanager
def loading(member: Member, applies: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turn what goes wrong while ``member`` is loaded into one error that names it.

    PEFT only warns of weights that the file lacks and leaves those matrices as they were initialised: a member
    that answers as the base model does, which is a smaller ensemble that looks like a whole one.

    Args:
        member: the member being loaded.
        applies: asked once something is raised, whether it is the member's fault.

    Raises:
        EnsembleError: the member could not be loaded whole.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
            yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError, UserWarning) as error:
        if isinstance(error, EnsembleError) or not applies():
            raise
        raise EnsembleError(
            f"{member.name} ({member.folder}) could not be loaded: {error}; no smaller ensemble runs in its place: "
            "find out more with `lora-ensemble check`, or name the members to use in adapters="
        ) from error


def twins(members: Sequence[Member]) -> dict[str, str]:
    """Return, by the name of each member that repeats another's files, the first of its kind."""
    first: dict[str, str] = {}
    return {
        member.name: original
        for member in members
        if (original := first.setdefault(member.sha256, member.name)) != member.name
    }
