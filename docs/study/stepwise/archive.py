"""A study's numbers without its benchmarks' texts: small enough to lie beside the page, and enough for its tables.

A tar file of what a study's folder has: the records of its steps, and of each evaluation the members' scores. Unpacked,
it is such a folder; only the adapters are missing.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lm_eval_lora_ensemble.analysis.runs import load_samples
from lm_eval_lora_ensemble.disk import flush
from stepwise.running import RECORDS, Record

DECIMALS = 4
"""Of a score in nats; a page shows three."""

_OF_AN_ENSEMBLE = ("fingerprint", "epoch", "calibration")


def beside(page: Path) -> Path:
    """Return where the numbers lie that a published page is made of."""
    return page.parent / "study" / f"{page.stem}.tar.xz"


def pack(output: Path, records: Mapping[str, Record], archive: Path) -> None:
    """Write the numbers of all steps that are done, the same bytes for the same numbers.

    Args:
        output: the study's folder.
        records: of the steps that are done, by name.
        archive: the file, ``*.tar.xz``; replaced as a whole.

    Raises:
        OSError: it cannot be written.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    scratch = archive.with_name(f".{archive.name}")
    with tarfile.open(scratch, "w:xz", preset=9) as tar:
        for name in sorted(records):
            path = output / RECORDS / f"{name}.json"
            _add(tar, str(path.relative_to(output)), path.read_text(encoding="utf-8"))
            for file in sorted((output / name).rglob("*_20*.json*")) if name.startswith("results/") else ():
                lines = (
                    _samples(file) if file.suffix == ".jsonl" else [_results(file, records[name].adapters)]
                )
                _add(tar, f"{name}/{file.name}", "".join(f"{line}\n" for line in lines))
    flush(scratch)
    scratch.replace(archive)


def unpack(archive: Path, output: Path) -> None:
    """Make a study's folder of an archive.

    Raises:
        OSError: it cannot be read, or the folder not be written.
    """
    with tarfile.open(archive) as tar:
        tar.extractall(output, filter="data")


def _add(tar: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _samples(file: Path) -> Iterator[str]:
    """Return a line a document as our own reader of samples understands it, without texts."""
    (of_task,) = load_samples(file).scores.values()
    for d, (document, choices) in enumerate(zip(of_task.documents, of_task.counts, strict=True)):
        number, _, digest = str(document).partition(":")
        gold = [] if of_task.is_gold is None else np.flatnonzero(of_task.is_gold[d]).tolist()
        lengths = {unit: of[d, :choices].astype(int).tolist() for unit, of in of_task.lengths.items()}
        members = of_task.loglikelihoods[:, d, :choices].round(DECIMALS).tolist()
        sample = {
            "doc_id": int(number),
            "doc_hash": digest,
            "golds": gold,
            "lengths": lengths,
            "members": members,
        }
        yield json.dumps({**sample, "other_class": of_task.other_class}, separators=(",", ":"))


def _results(file: Path, adapters: str) -> str:
    """Return what tells models apart and their temperatures; no path of the machine that they were made on."""
    ensemble = json.loads(file.read_text(encoding="utf-8"))["config"]["lora_ensemble"]
    kept = {key: ensemble.get(key) for key in _OF_AN_ENSEMBLE}
    kept["base_model"] = Path(ensemble["base_model"]).name
    return json.dumps(
        {"results": {}, "config": {"model_args": {"adapters": adapters}, "lora_ensemble": kept}}
    )
