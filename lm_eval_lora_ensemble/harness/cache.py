"""A cache of scores belongs to one ensemble: ``--use_cache`` made safe."""

from __future__ import annotations

import contextlib
import io
import pickle
import sqlite3
import threading
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from lm_eval_lora_ensemble.disk import sampled_digest
from lm_eval_lora_ensemble.errors import EnsembleError

# lm-eval's own keys are hexadecimal sha256 digests, so this can be none of them
OWNER_KEY = "lora-ensemble owner"
# seconds that an answer may take once the run is stopped
_PATIENCE = 3.0
# module of 0.1 -> module of today
_MOVED = {"lm_eval_lora_ensemble.mixture": "lm_eval_lora_ensemble.scoring.loglikelihood"}


AFFECTING = (
    "tokenizer",
    "add_bos_token",
    "prefix_token_id",
    "subfolder",
    "gguf_file",
    "mixed_precision_dtype",
    "think_end_token",
)
"""Arguments of lm-eval's model that scores or texts depend on; a cache says only those that were given."""


def identity_of(model: Any) -> dict[str, Any]:
    """Return what a score of a ``LoraEnsembleLM`` depends on besides the request."""
    ensemble, average = model.ensemble, model.generation_average
    return {
        "base model": ensemble.base_model,
        "revision": model.revision,
        "base weights": _base_weights(model),
        "epoch": ensemble.epoch,
        "members": [member.sha256 for member in ensemble.members],
        "average": model.average,
        "dtype": str(model.model.dtype),
        "quantization": {name: str(value) for name, value in model.quantization.items()} or None,
        "max_length": model.max_length,
        **model.encoding,
        # caches of release 0.1 know no other
        **({} if average == "posterior" else {"generation_average": average}),
    }


def _base_weights(model: Any) -> str | None:
    """Return what tells the base model's weights from others under its name: of a folder, a digest of its files."""
    place = Path(model.ensemble.base_model).expanduser()
    if place.is_dir():
        return sampled_digest(place)
    commit: str | None = getattr(model.model.config, "_commit_hash", None)
    return commit


_NEWER = frozenset({"base weights"})
"""What caches of earlier releases do not know of their scores, and are believed in."""


def claim_cache(cache: MutableMapping[str, Any], identity: dict[str, Any]) -> None:
    """Make an empty cache ours, or check that a used one is.

    Args:
        cache: lm-eval's key-value store.
        identity: everything but the request that a score depends on, by a name the user knows it by.

    Raises:
        EnsembleError: the cache holds scores of another model, or of this one under other settings.
    """
    if OWNER_KEY not in cache:
        if len(cache):
            raise EnsembleError(
                "the cache of --use_cache holds scores of another model (it has no lora-ensemble owner); name a new one"
            )
        cache[OWNER_KEY] = identity
        return
    owner = cache[OWNER_KEY]
    identity = {name: value for name, value in identity.items() if name in owner or name not in _NEWER}
    differing = [name for name in {**identity, **owner} if owner.get(name) != identity.get(name)]
    if differing:
        now, then = identity.get(differing[0]), owner.get(differing[0])
        values = "" if isinstance(now, list) else f": {then} there, {now} now"
        raise EnsembleError(
            f"the cache of --use_cache belongs to another ensemble; {' and '.join(differing)} differ{values}; "
            "name a new one"
        )


def saved_scores(cache: MutableMapping[str, Any] | None) -> str:
    """Say how much of a run is in the cache, or that there is none: the answer to Ctrl-C.

    Args:
        cache: lm-eval's key-value store, in which every score is committed as it is made.
    """
    if cache is None:
        return "nothing was saved; with --use_cache PATH, a run goes on where it was stopped"
    path = getattr(cache, "filename", "the cache")
    return (
        f"{_count(cache) - 1} scored requests are saved in {path}; the same command with the same --use_cache goes on "
        "from there"
    )


def _count(cache: MutableMapping[str, Any]) -> int:
    """Return the number of entries, also where the store does not answer any more.

    sqlitedict talks to a thread of its own through a queue. A Ctrl-C inside ``Condition.notify`` leaves a waiter there
    that swallows the next wake-up, and then nobody answers: so one waits for a while, and looks into the file.
    """
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(len(cache)), daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    if found:
        return found[0]
    with contextlib.closing(sqlite3.connect(cache.filename)) as file:  # type: ignore[attr-defined]
        (count,) = file.execute(f'SELECT COUNT(*) FROM "{cache.tablename}"').fetchone()  # type: ignore[attr-defined]
    return int(count)


def read_older_scores(cache: Any) -> None:
    """Let a cache be read that an earlier release wrote: its pickles name classes by the addresses of that time.

    Args:
        cache: lm-eval's ``SqliteDict``, or another store, which is left alone.
    """
    if hasattr(cache, "decode"):
        cache.decode = lambda stored: _Unpickler(io.BytesIO(bytes(stored))).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(_MOVED.get(module, module), name)
