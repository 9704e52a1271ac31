"""``lora-ensemble check ENSEMBLE``: is every member what it claims to be? One line a member.

The checks are those that loading does (:mod:`.adapters`), and the manifest's checksums. Neither PEFT nor torch
is loaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_eval_lora_ensemble.disk import sha256
from lm_eval_lora_ensemble.ensemble.adapters.folder import Adapter, check_adapter, inside
from lm_eval_lora_ensemble.ensemble.hub import at_hand
from lm_eval_lora_ensemble.ensemble.listing import refuse_unfinished
from lm_eval_lora_ensemble.ensemble.members import Ensemble, Member, Source, common_base, find_sources
from lm_eval_lora_ensemble.errors import EXIT_CODE, EnsembleError, one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "ensemble", help="an ensemble folder, a folder of adapters, one adapter, or a Hub id of either"
    )
    parser.add_argument(
        "--pretrained",
        metavar="BASE",
        help="the base model, where the adapters name none, as in --model_args",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check every member and kept epoch; return 0 if all are sound, 2 if any is not. Nothing is written.

    Raises:
        EnsembleError: no members, or a folder that training has not finished.
    """
    folder = Path(str(at_hand(arguments.ensemble, everything=True))).expanduser()
    refuse_unfinished(folder)
    sources, listed = find_sources(folder)
    sound: dict[str, Adapter] = {}
    for source in sources:
        try:
            adapter, detail = _check_member(folder.resolve(), source)
            twin = next((name for name, other in sound.items() if other.sha256 == adapter.sha256), None)
            if twin:
                detail += f"; WARNING: the same adapter as {twin}, which adds nothing to the ensemble"
            sound[source.name] = adapter
            print(one_line(f"{source.name}: ok, {detail}"))
        except EnsembleError as error:  # noqa: PERF203 - one broken member must not hide the others
            print(one_line(f"{source.name}: BROKEN, {error}"))
    if len(sound) < len(sources):
        print(f"{len(sources) - len(sound)} of {len(sources)} members are BROKEN")
        return EXIT_CODE
    members = tuple(Member(name, adapter.folder, adapter.sha256) for name, adapter in sound.items())
    configs = [adapter.config for adapter in sound.values()]
    ensemble = Ensemble(*common_base(configs, listed, arguments.pretrained), members)
    print(one_line(f"{len(members)} members on {ensemble.base_model}, fingerprint {ensemble.fingerprint}"))
    return 0


def _check_member(root: Path, source: Source) -> tuple[Adapter, str]:
    """Check a member's final adapter and, where a manifest lists them, its files and epochs.

    Args:
        root: the ensemble folder, with links followed.
        source: the member.

    Returns:
        The adapter, and what it is in words.

    Raises:
        EnsembleError: an adapter is not sound, or a file is not the manifest's.
    """
    adapter = check_adapter(source.folder, source.root)
    weights = adapter.weights
    detail = f"rank {adapter.config.rank}, {len(weights.layers)} adapted layers, {weights.n_parameters:,} parameters"
    if source.entry:
        _check_files(root, source)
        for folder in source.epochs.values():
            check_adapter(folder, source.root)
        epochs = ", ".join(map(str, sorted(source.epochs))) or "none"
        detail += f", {len(source.entry.files)} files match their checksums, epochs {epochs}"
    return adapter, detail


def _check_files(root: Path, source: Source) -> None:
    """Compare every file that the manifest lists of a member with its checksum."""
    for relative, expected in source.entry.files.items() if source.entry else ():
        inside((root / relative).parent, root)
        path = inside(root / relative, source.root)
        if not path.is_file():
            raise EnsembleError(f"{path} is missing; copy the folder again or train the member again")
        if sha256(path) != expected:
            raise EnsembleError(
                f"{path} differs from its checksum; copy the folder again or train the member again"
            )
