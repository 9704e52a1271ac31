"""Putting the adapters on the base model: every member whole, or one error that names it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError

from lm_eval_lora_ensemble.ensemble.adapters.fit import check_fit, check_loaded
from lm_eval_lora_ensemble.ensemble.members import Member
from lm_eval_lora_ensemble.errors import EnsembleError


def attach_members(model: Any, base: str, members: Sequence[Member]) -> tuple[Any, list[str]]:
    """Load every member's adapter with PEFT's own loader.

    Args:
        model: the base model alone; PEFT changes it in place.
        base: its name, for messages.
        members: at least one, all checked by :func:`.members.find_ensemble`.

    Returns:
        The ``PeftModel``, and PEFT's names for the members in their order.

    Raises:
        EnsembleError: an adapter does not fit the base model, or cannot be loaded whole.
    """
    check_fit(model, base, [member.folder for member in members])
    names: list[str] = []
    for member in members:
        name = f"member_{len(names)}"
        try:
            if names:
                model.load_adapter(str(member.folder), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(member.folder), adapter_name=name)
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise EnsembleError(
                f"{member.name} ({member.folder}) could not be loaded: {type(error).__name__}: {error}; no smaller "
                "ensemble runs in its place: find out more with `lora-ensemble check`, or name the members to use "
                "in adapters="
            ) from error
        check_loaded(model, name, member.folder)
        names.append(name)
    _keep_tied(model)
    return model, names


def _keep_tied(model: Any) -> None:
    """Let lm-eval tie the weights of a model whose head is wrapped: the base model's are, since it was loaded.

    transformers ties by setting ``lm_head.weight``, which a wrapped head has as a property, and ends in a KeyError.
    """
    head = model.get_output_embeddings()
    if isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        model.tie_weights = lambda *_, **__: None


def twins(members: Sequence[Member]) -> dict[str, str]:
    """Return, by the name of each member that repeats another's files, the first of its kind."""
    first: dict[str, str] = {}
    return {
        member.name: original
        for member in members
        if (original := first.setdefault(member.sha256, member.name)) != member.name
    }
