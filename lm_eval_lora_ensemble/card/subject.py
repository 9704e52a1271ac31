"""What a card is about: an ensemble, what it is called, and what the Hub needs to know of its base model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.card.results import RunResults
from lm_eval_lora_ensemble.ensemble.hub import HUB_ID
from lm_eval_lora_ensemble.ensemble.manifest import Manifest, MemberEntry
from lm_eval_lora_ensemble.ensemble.members import same_model
from lm_eval_lora_ensemble.errors import EnsembleError, one_line


@dataclass(frozen=True, eq=False)
class Subject:
    """An ensemble and its results.

    Attributes:
        name: what it is called.
        repository: Hub id that it has or will have; None where nobody said.
        base_model: the base's Hub id; None where it is only known as a local folder.
        base_label: what the base is called.
        base_arguments: what ``--model_args`` has to say of the base, where the adapters do not name it as the Hub does.
        manifest: the ensemble's.
        results: at least one run's.
        level: two-sided coverage of the intervals.
        datasets: Hub ids of the data that the members were trained on, as far as known.
        license: of the adapters; None where nobody said.
    """

    name: str
    repository: str | None
    base_model: str | None
    base_label: str
    base_arguments: str
    manifest: Manifest
    results: Sequence[RunResults]
    level: float
    datasets: Sequence[str] = ()
    license: str | None = None
    tags: Sequence[str] = field(
        default=("lora", "ensemble", "uncertainty", "calibration", "lm-eval-lora-ensemble")
    )

    @property
    def members(self) -> list[MemberEntry]:
        """The members, in order."""
        return self.manifest.members


def hub_name(base_model: str) -> str | None:
    """Return the Hub id that a base model's name or its place in a Hub's cache says; None for other folders.

    Example:
        >>> hub_name("/home/x/.cache/huggingface/hub/models--org--model/snapshots/0123")
        'org/model'
        >>> hub_name("org/model"), hub_name("/models/model")
        ('org/model', None)
    """
    cached = next((part for part in re.split(r"[/\\]", base_model) if part.startswith("models--")), None)
    if cached:
        return "/".join(cached.removeprefix("models--").split("--", 1))
    return base_model if HUB_ID.fullmatch(base_model) and not Path(base_model).exists() else None


def base_arguments(named: str, base_model: str | None) -> str:
    """Return the model arguments that load a base: none where the adapters' own name of it is its Hub id.

    Args:
        named: the base as the adapters name it.
        base_model: its Hub id; None where it is not known.

    Example:
        >>> base_arguments("org/model", "org/model")
        ''
        >>> base_arguments("/models/model", "org/model"), base_arguments("/models/mine", "org/model")
        ('pretrained=org/model,', 'pretrained=org/model,allow_base_mismatch=True,')
    """
    if named == base_model:
        return ""
    mismatch = base_model is not None and not same_model(named, base_model)
    return f"pretrained={base_model or 'BASE'},{'allow_base_mismatch=True,' if mismatch else ''}"


def require_hub_id(text: str, option: str) -> str:
    """Return ``text``.

    Raises:
        EnsembleError: it is no Hub id.
    """
    if not HUB_ID.fullmatch(text):
        raise EnsembleError(f"{option} {text}: give a Hub id, ORGANISATION/NAME")
    return text


def label_of(base_model: str) -> str:
    """Return what a base model is called, without the folders of somebody's machine."""
    return hub_name(base_model) or one_line(re.split(r"[/\\]", base_model.rstrip("/\\"))[-1])


def dataset_of(config: Mapping[str, Any]) -> str | None:
    """Return the Hub id of a task's dataset, from lm-eval's configuration of it; None for local files."""
    arguments = config.get("dataset_kwargs")
    named = [config.get("dataset_path"), arguments.get("dataset") if isinstance(arguments, Mapping) else None]
    return next(
        (
            name
            for name in named
            if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).exists()
        ),
        None,
    )


def trained_on(manifest: Manifest, results: Sequence[RunResults]) -> list[str]:
    """Return the datasets of the recipe's tasks, as far as those tasks are among the results too."""
    tasks = manifest.recipe.get("task")
    names = [tasks] if isinstance(tasks, str) else tasks if isinstance(tasks, list) else []
    configs = [
        result.run.task_configs[name]
        for result in results
        for name in names
        if name in result.run.task_configs
    ]
    return list(dict.fromkeys(found for config in configs if (found := dataset_of(config))))
