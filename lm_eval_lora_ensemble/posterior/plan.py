"""What was asked of ``draw``: how many draws from which member by which settings; no file is read or written here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.options import resolve
from lm_eval_lora_ensemble.posterior.registry import COMMAND_OF_TASKS, Method

DRAWS = 10
"""Of every method that is not a list with fewer."""


@dataclass(frozen=True)
class Settings:
    """Everything that was asked for, defaults included.

    Attributes:
        command: what the command takes, by name.
        options: the method's own.
    """

    command: Mapping[str, Any]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, method: Method, given: Mapping[str, Any]) -> Settings:
        """Resolve what was given to a method.

        Raises:
            EnsembleError: an unknown key, a malformed value, or no task for a method that needs one.
        """
        command = method.command_options
        values = resolve({**method.options, **command}, given, method.name)
        if method.task and not values["task"]:
            raise EnsembleError(f"{method.name} fits on a task; give task=NAME, one of lm-eval's")
        return cls({name: values[name] for name in command}, {name: values[name] for name in method.options})

    @property
    def of_the_fit(self) -> dict[str, Any]:
        """The options that decide what is fitted: the method's own, and its task's."""
        task = {name: value for name, value in self.command.items() if name in COMMAND_OF_TASKS}
        return {**self.options, **task}


def draws_each(method: Method, members: int, settings: Settings, where: str) -> int | None:
    """Return how many draws each member of the source gives; None if the method decides it.

    Args:
        method: what draws.
        members: of the source.
        settings: what was asked for.
        where: the source, for messages.

    Raises:
        EnsembleError: a number that cannot be shared, or an ensemble of several for a method of one.
    """
    draws, each = settings.command["draws"], settings.command["draws_per_member"]
    if draws is not None and each is not None:
        raise EnsembleError("draws= and draws_per_member= are two ways to say one thing; give one of them")
    if each is not None or members == 1:
        return draws if each is None else each
    if not method.every_member:
        raise EnsembleError(
            f"{where} has {members} members and {method.name} draws from one; say which with member=0 … "
            f"member={members - 1}, or draw from each of them with draws_per_member="
        )
    if draws is None:
        return math.ceil(DRAWS / members)
    if draws % members:
        raise EnsembleError(
            f"draws={draws} cannot be shared equally by the {members} members of {where}; give a multiple of {members}"
        )
    return draws // members
