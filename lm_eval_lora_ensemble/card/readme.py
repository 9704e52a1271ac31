"""Whose README.md is it? One that a person wrote is never replaced without being asked to.

A card ends with a comment that holds the sha256 of all that stands above it. As long as it holds, the command wrote
every character; after a person's first change it does not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lm_eval_lora_ensemble.disk import sha256, write_text
from lm_eval_lora_ensemble.errors import EnsembleError

FILE_NAME = "README.md"

_MARK = "\n<!-- written by `lora-ensemble card`; sha256 of what stands above: {} -->\n"
_MARKED = re.compile(r"(?s)(.*)" + re.escape(_MARK).replace(r"\{\}", "([0-9a-f]{64})"))
_MAX_BYTES = 4 << 20
# what PEFT puts above and below the Hub's own empty template
_STOCK_KEYS = {"base_model", "library_name", "pipeline_tag", "tags"}
_STOCK_TAGS = re.compile(r"base_model:adapter:.*|lora|peft|transformers")
_STOCK_LINES = re.compile(r"- PEFT \d[\w.+-]*|### Framework versions")


def sealed(text: str) -> str:
    """Return a card with the comment by which it is known as ours."""
    text = text.rstrip("\n") + "\n"
    return text + _MARK.format(_digest(text))


def is_sealed(text: str) -> bool:
    """Whether a card is what :func:`sealed` returned, with no character changed; line ends do not count."""
    found = _MARKED.fullmatch(text.replace("\r\n", "\n"))
    return found is not None and _digest(found[1]) == found[2]


def is_stock(text: str) -> bool:
    """Whether a README.md is PEFT's empty template, in which nobody has written anything.

    Every line has to be one of the template as the installed ``huggingface_hub`` has it, or PEFT's version, and the
    metadata no more than PEFT writes: a line, tag or key of anybody else's makes it theirs.
    """
    from huggingface_hub import ModelCard, ModelCardData

    try:
        card = ModelCard(text)
        metadata = card.data.to_dict()
    except Exception:  # noqa: BLE001 - whatever a person's metadata does to a YAML reader, it is not PEFT's
        return False
    tags = metadata.get("tags") or []
    stock = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    return (
        metadata.keys() <= _STOCK_KEYS
        and isinstance(tags, list)
        and all(_STOCK_TAGS.fullmatch(str(tag)) for tag in tags)
        and all(line in stock or _STOCK_LINES.fullmatch(line) for line in card.text.splitlines())
    )


def refuse_foreign(paths: Iterable[Path], listed: Mapping[Path, str]) -> None:
    """Check that no README.md is a person's.

    Args:
        paths: where cards will be written.
        listed: sha256 of files as the ensemble's manifest has them: what training wrote and nobody changed since.

    Raises:
        EnsembleError: one is; or it cannot be read.
    """
    foreign = [path for path in paths if not _may_go(path, listed.get(path))]
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise EnsembleError(
            f"{foreign[0]}{more} was written or changed by somebody; keep a copy and say --force to replace it, or "
            "write the cards elsewhere with --output FOLDER"
        )


def _may_go(path: Path, listed: str | None) -> bool:
    try:
        if not path.exists() and not path.is_symlink():
            return True
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return False
        if listed is not None and sha256(path) == listed:
            return True
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return not text.strip() or is_sealed(text) or is_stock(text)


def write_card(path: Path, text: str) -> None:
    """Write one card whole or not at all.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
