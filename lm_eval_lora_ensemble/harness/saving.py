"""lm-eval's results and samples of a run, saved all together or not at all.

lm-eval writes the results file first, then each task's samples, each in place: a run killed meanwhile leaves a file
that ends in the middle, or results without their samples. For runs of ensembles, everything is written into a hidden
folder beside its destination, and one rename decides: before it nothing was saved, after it everything is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.utils import sanitize_model_name

from lm_eval_lora_ensemble.disk import all_or_nothing
from lm_eval_lora_ensemble.ensemble.members import DEFAULT_FOLDER
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness import patches

LOCK = ".saving.lock"
_LONGEST_NAME = 120
"""Characters of a folder's name; a file system takes 255 bytes."""


def save_runs_whole() -> None:
    """Let lm-eval's tracker write an ensemble's run whole; other models' runs are written as before."""
    patches.save_by(_save_results, _save_samples)


def _save_results(
    write_results: Callable[..., None],
    write_samples: Callable[..., None],
    tracker: Any,
    results: dict[str, Any],
    samples: dict[str, list[Any]] | None,
) -> None:
    tracker._samples_saved = set()
    if not tracker.output_path or "lora_ensemble" not in results.get("config", {}):
        write_results(tracker, results, samples)
        return

    _name_by_adapters(tracker.general_config_tracker, results["config"])

    def write() -> None:
        write_results(tracker, results, samples)
        for task, rows in (samples or {}).items():
            # it replaces values of the samples that it is given
            write_samples(tracker, task, [dict(row) for row in rows])

    _save(tracker, write, {task: len(rows) for task, rows in (samples or {}).items()})
    tracker._samples_saved = set(samples or {})


def _save_samples(write_samples: Callable[..., None], tracker: Any, task: str, samples: list[Any]) -> None:
    if task in getattr(tracker, "_samples_saved", ()):
        tracker._samples_saved.remove(task)
    else:
        write_samples(tracker, task, samples)


def _name_by_adapters(tracker: Any, config: dict[str, Any]) -> None:
    """Let the run's folder have the adapters' name, as that of ``hf`` has its ``peft``'s.

    lm-eval, which does not know ``adapters``, would name it after the base model, whoever is on it, or at random.
    """
    arguments = config.get("model_args")
    if not isinstance(arguments, dict):  # evaluated from Python with a loaded model
        return
    adapters = arguments.get("adapters") or DEFAULT_FOLDER
    name = adapters if isinstance(adapters, str) else ";".join(map(str, adapters))
    folder = sanitize_model_name(name).lstrip("._") or tracker.model_name_sanitized
    if len(folder) > _LONGEST_NAME:
        folder = f"{folder[: _LONGEST_NAME - 9]}_{config['lora_ensemble']['fingerprint'][:8]}"
    tracker.model_name, tracker.model_name_sanitized = name, folder


def _save(tracker: Any, write: Callable[[], None], sizes: dict[str, int]) -> None:
    """Let ``write`` fill a hidden folder instead of the tracker's, and move all of it into place.

    Args:
        tracker: lm-eval's ``EvaluationTracker``.
        write: writes one results file and the samples of each task.
        sizes: number of samples by task.

    Raises:
        EnsembleError: a file did not get written whole, of which lm-eval itself only makes a warning.
    """
    asked = tracker.output_path
    # lm-eval takes a path that ends in .json as a file's name, any other as a folder
    place = Path(asked)
    folder, name = (place.parent, place.name) if place.suffix == ".json" else (place, "")
    with all_or_nothing(folder, LOCK) as hidden:
        tracker.output_path = str(hidden / name)
        try:
            write()
        finally:
            tracker.output_path = asked
        written = [path for path in hidden.rglob("*") if path.is_file()]
        if len(written) != 1 + len(sizes) or not all(_is_whole(path, sizes) for path in written):
            raise EnsembleError(
                f"the results could not be written to {folder} and nothing of them was kept; see to the disk and run "
                "again, with --use_cache if that was on"
            )


def _is_whole(path: Path, sizes: dict[str, int]) -> bool:
    """Whether a results file parses, or a samples file has all its lines; if so it is flushed to the disk."""
    with path.open("rb+") as stream:
        if path.suffix == ".json":
            try:
                json.load(stream)
            except ValueError:
                return False
        else:
            task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
            if sum(line.endswith(b"\n") for line in stream) != sizes.get(task):
                return False
        os.fsync(stream.fileno())
    return True
