"""What is refused of a recipe whose values are each fine but do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval_lora_ensemble.errors import EnsembleError

_OWNED = {
    ("choice_scores", "choice_temperature"): ("objective", "choices"),
    ("ivon_ess", "ivon_hess_init", "ivon_beta1", "ivon_beta2", "ivon_clip_radius"): ("optimizer", "ivon"),
    ("blob_epsilon", "blob_prior", "blob_kl_learning_rate"): ("posterior", "blob"),
}
"""Keys that mean something under one value of another key alone."""


def check_together(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    """Refuse values that are each fine but not together.

    Args:
        values: every key of a recipe.
        defaults: of the keys that have one.
        where: the recipe's source, for messages.

    Raises:
        EnsembleError: the first pair that does not go together.
    """
    if values["early_stopping"] is not None and values["validation_limit"] == 0:
        raise EnsembleError(f"{where}: early_stopping needs validation documents, validation_limit is 0")
    for names, (owner, needed) in _OWNED.items():
        for name in names:
            if values[name] != defaults[name] and values[owner] != needed:
                raise EnsembleError(
                    f"{where}: {name} is for {owner}={needed}, not for {values[owner]}; remove one of the two"
                )
    _check_posterior(values, where)
    given, members = len(values["initial_adapters"]), values["members"]
    if given not in (0, 1, members):
        raise EnsembleError(
            f"{where}: initial_adapters names {given} folders for {members} members; "
            "give one ensemble folder, one adapter for all, or one for each member"
        )


def _check_posterior(values: Mapping[str, Any], where: str) -> None:
    optimizer, posterior = values["optimizer"], values["posterior"]
    if values["swa_learning_rate"] is not None and values["swa_start"] is None:
        raise EnsembleError(
            f"{where}: swa_learning_rate without swa_start; say where it begins, for example swa_start: 0.75"
        )
    if optimizer == "ivon" and posterior != "none":
        raise EnsembleError(
            f"{where}: optimizer=ivon trains one posterior and posterior={posterior} another; remove one"
        )
    if values["dora"] and (optimizer == "ivon" or posterior != "none"):
        kind = "optimizer=ivon" if optimizer == "ivon" else f"posterior={posterior}"
        raise EnsembleError(f"{where}: {kind} has none over DoRA's magnitudes; remove it, or dora")
