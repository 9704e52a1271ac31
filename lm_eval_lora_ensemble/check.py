"""``lora-ensemble check ENSEMBLE``: is every member what it claims to be? One line a member.

Reads adapters as data only: JSON, and safetensors through its own reader. Neither PEFT nor torch is loaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lm_eval_lora_ensemble import manifest
from lm_eval_lora_ensemble.errors import EXIT_CODE, EnsembleError, one_line
from lm_eval_lora_ensemble.members import CONFIG, WEIGHTS, Ensemble, find_ensemble


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "ensemble", type=Path, help="an ensemble folder, a folder of adapters, or one adapter"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check every member and kept epoch; return 0 if all are sound, 2 if any is not.

    A folder that training has filled member by member gets its manifest first.
    """
    if (arguments.ensemble.expanduser() / "recipe.yaml").is_file():
        from lm_eval_lora_ensemble.train.completion import complete

        complete(arguments.ensemble.expanduser().absolute())
    ensemble = find_ensemble(arguments.ensemble)
    book = _manifest_of(arguments.ensemble)
    entries = {entry.name: entry for entry in book.members} if book else {}
    sound = True
    twins = _twins(ensemble)
    for member in ensemble.members:
        try:
            detail = _check_adapter(member.folder)
            entry = entries.get(member.name)
            if entry:
                n_files = _check_files(arguments.ensemble.expanduser().resolve(), entry)
                for folder in entry.epochs.values():
                    _check_adapter(arguments.ensemble.expanduser().resolve() / folder)
                detail += f", {n_files} files match their checksums, epochs {_numbers(entry.epochs)}"
            if member.name in twins:
                detail += (
                    f"; WARNING: the same adapter as {twins[member.name]}, which adds nothing to the ensemble"
                )
            print(one_line(f"{member.name}: ok, {detail}"))
        except EnsembleError as error:  # noqa: PERF203 - one broken member must not hide the others
            sound = False
            print(one_line(f"{member.name}: BROKEN, {error}"))
    print(
        one_line(
            f"{len(ensemble.members)} members on {ensemble.base_model}, fingerprint {ensemble.fingerprint}"
        )
    )
    return 0 if sound else EXIT_CODE


def _manifest_of(folder: Path) -> manifest.Manifest | None:
    path = folder.expanduser()
    return manifest.Manifest.read(path) if (path / manifest.FILE_NAME).is_file() else None


def _numbers(epochs: dict[int, str]) -> str:
    return ", ".join(map(str, sorted(epochs))) or "none"


def _twins(ensemble: Ensemble) -> dict[str, str]:
    """Return, for each member that repeats another, the first of its kind."""
    first: dict[str, str] = {}
    repeated = {}
    for member in ensemble.members:
        original = first.setdefault(member.sha256, member.name)
        if original != member.name:
            repeated[member.name] = original
    return repeated


def _check_files(root: Path, entry: manifest.MemberEntry) -> int:
    """Compare every file that the manifest lists with its checksum; return how many there are."""
    for relative, expected in entry.files.items():
        path = (root / relative).resolve()
        if not path.is_relative_to(root):
            raise EnsembleError(f"{manifest.FILE_NAME} lists {relative!r}, which lies outside {root}")
        if not path.is_file():
            raise EnsembleError(f"{path} is missing; copy the folder again or train the member again")
        if manifest.sha256(path) != expected:
            raise EnsembleError(
                f"{path} differs from its checksum; copy the folder again or train the member again"
            )
    return len(entry.files)


def _check_adapter(folder: Path) -> str:
    """Check one adapter's configuration against its tensors; return what it is.

    Raises:
        EnsembleError: not LoRA, unreadable or incomplete weights, a rank other than configured, a value that
            is not finite.
    """
    config = _config(folder)
    if config.get("peft_type") != "LORA":
        raise EnsembleError(f"{folder / CONFIG} is of type {config.get('peft_type')!r}, not LORA")
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    n_parameters = 0
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - the reader is no mapping
                values = file.get_tensor(name)
                if not np.isfinite(values).all():
                    raise EnsembleError(f"{folder / WEIGHTS} holds a value in {name} that is not finite")
                n_parameters += values.size
                module, _, kind = name.partition(".lora_")
                if kind[:1] in ("A", "B"):
                    pairs.setdefault(module, {})[kind[0]] = values.shape
    except (SafetensorError, OSError, TypeError) as error:
        raise EnsembleError(f"{folder / WEIGHTS} is not a readable safetensors file ({error})") from error
    _check_ranks(folder, config, pairs)
    return f"rank {config.get('r')}, {len(pairs)} adapted layers, {n_parameters:,} parameters"


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EnsembleError(f"{folder / CONFIG} is not readable JSON ({error})") from error
    if not isinstance(config, dict):
        raise EnsembleError(f"{folder / CONFIG} is not a JSON object")
    return config


def _check_ranks(folder: Path, config: dict[str, Any], pairs: dict[str, dict[str, tuple[int, ...]]]) -> None:
    if not pairs:
        raise EnsembleError(f"{folder / WEIGHTS} holds no LoRA matrices")
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    for module, shapes in pairs.items():
        if set(shapes) != {"A", "B"}:
            raise EnsembleError(f"{folder / WEIGHTS} lacks one of lora_A and lora_B of {module}")
        # an embedding's matrices are stored transposed, so the shared size may be on either side
        if not (set(shapes["A"]) & set(shapes["B"]) & ranks):
            raise EnsembleError(
                f"{folder / WEIGHTS}: {module} has shapes {shapes['A']} and {shapes['B']}, "
                f"not of rank {config.get('r')} as configured"
            )
