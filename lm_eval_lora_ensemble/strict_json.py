"""JSON from a stranger: bounded, UTF-8, no key twice, no NaN, and any refusal is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from lm_eval_lora_ensemble.errors import EnsembleError

MAX_DEPTH = 32


def read_json(path: Path, max_bytes: int, what: str = "readable JSON") -> Any:
    """Read a regular file as strict JSON.

    Args:
        path: the file; a pipe or device is refused, because reading it could wait for ever.
        max_bytes: the largest size that is read at all.
        what: what the message of an error says that the file is not.

    Raises:
        EnsembleError: the file cannot be read, is larger, or is not JSON as :func:`parse_json` takes it.
    """
    try:
        if not path.is_file():
            raise EnsembleError(f"{path} is not a file")
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise EnsembleError(f"{path} is not {what} ({error}); export it again") from error
    if len(data) > max_bytes:
        raise EnsembleError(f"{path} is not {what}: it is larger than {max_bytes:,} bytes")
    return parse_json(data, path, what)


def parse_json(data: bytes, path: Path, what: str = "readable JSON") -> Any:
    """Parse strict JSON that was read from ``path``, which the message of an error says is not ``what``.

    Raises:
        EnsembleError: not UTF-8, not JSON, a key twice in one object, NaN or Infinity, or nested deeper than
            ``MAX_DEPTH``.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
        if _depth(value) > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    except RecursionError as error:
        raise EnsembleError(f"{path} is not {what} (nested deeper than {MAX_DEPTH} levels)") from error
    except ValueError as error:
        raise EnsembleError(f"{path} is not {what} ({error}); export it again") from error
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what readers disagree on: which of two equal keys counts."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _depth(value: Any) -> int:
    """Return how many containers deep ``value`` is nested; a plain value counts 0."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0
