"""What a results file says of the model that made it: enough to run it again and to tell it from another."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_lora_ensemble.ensemble.calibration import Calibration
from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME, Manifest
from lm_eval_lora_ensemble.ensemble.members import Ensemble, Member
from lm_eval_lora_ensemble.errors import EnsembleError

if TYPE_CHECKING:
    import torch

PACKAGES = ("lm-eval-lora-ensemble", "lm-eval", "torch", "transformers", "peft", "safetensors", "datasets")


def versions() -> dict[str, str]:
    """Return the version of Python and of every installed package that decides members' weights or scores."""
    return {
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Return the device that computed, with the accelerator's name: ``cuda:0 (NVIDIA H100)``, ``cpu``."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def manifest_at(adapters: str | Path | Sequence[str | Path]) -> Manifest | None:
    """Return an ensemble folder's manifest; None of adapters without one."""
    if not isinstance(adapters, (str, Path)):
        return None
    folder = Path(adapters).expanduser()
    return Manifest.read(folder) if (folder / FILE_NAME).is_file() else None


def calibration_in_use(calibration: Calibration | None, ensemble: Ensemble) -> dict[str, Any] | None:
    """Return what the manifest's temperatures say of the members that answer; None of an earlier epoch's."""
    if calibration is None or ensemble.epoch is not None:
        return None
    return calibration.of_first(len(ensemble.members)).as_mapping()


def scale_in_use(temperature: str, calibration: Mapping[str, Any] | None) -> float | None:
    """Return T of the length-normalised metrics, None to cross-fit it.

    Args:
        temperature: the model argument.
        calibration: from :func:`calibration_in_use`.

    Raises:
        EnsembleError: an unknown word, or no temperature from validation.
    """
    if temperature == "crossfit":
        return None
    if temperature != "validation":
        raise EnsembleError(f"temperature={temperature}: use crossfit or validation")
    try:
        return float(calibration["scores"]["chars"]["ensemble"]["temperature"])  # type: ignore[index]
    except (KeyError, TypeError):
        raise EnsembleError(
            "temperature=validation: the ensemble has no temperature for scores by characters with these members; "
            "`lora-ensemble calibrate ENSEMBLE TASK` writes one"
        ) from None


def method_of(listed: Manifest | None) -> dict[str, Any] | None:
    """Return how the members of a manifest were drawn; None of members that were trained."""
    return asdict(listed.method) if listed and listed.method else None


def member_in_results(member: Member) -> dict[str, Any]:
    """Return what a results file says of a member."""
    drawn = {"draw": member.draw, "source": asdict(member.provenance)} if member.provenance else {}
    return {
        "name": member.name,
        "folder": str(member.folder),
        "seed": member.seed,
        "sha256": member.sha256,
        **drawn,
    }


def recipe_of(listed: Manifest | None) -> dict[str, Any] | None:
    """Return the recipe in a manifest, but for where it was written; None without one."""
    recipe = listed.recipe if listed else {}
    return {key: value for key, value in recipe.items() if key != "output"} or None


def in_results(model: Any, engine: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a results file says of a ``LoraEnsembleLM``: all that made its scores.

    Args:
        model: a ``LoraEnsembleLM``.
        engine: how requests were scored last.
    """
    ensemble = model.ensemble
    return {
        "base_model": ensemble.base_model,
        "revision": ensemble.revision,
        "epoch": ensemble.epoch,
        "average": model.average,
        "generation_average": model.generation_average,
        "fingerprint": ensemble.fingerprint,
        "members": [member_in_results(member) for member in ensemble.members],
        "recipe": model.recipe,
        "method": model.method,
        "calibration": calibration_in_use(model.calibration, ensemble),
        # lm-eval's own `device` is what was asked for
        "device": device_name(model.device),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "engine": engine,
        "versions": versions(),
    }
