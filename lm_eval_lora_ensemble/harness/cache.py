"""A cache of scores belongs to one ensemble: ``--use_cache`` made safe."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from lm_eval_lora_ensemble.errors import EnsembleError, Interruption

# lm-eval's own keys are hexadecimal sha256 digests, so this can be none of them
OWNER_KEY = "lora-ensemble owner"


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
    differing = [name for name, value in identity.items() if owner.get(name) != value]
    if differing:
        now, then = identity[differing[0]], owner.get(differing[0])
        values = "" if isinstance(now, list) else f": {then} there, {now} now"
        raise EnsembleError(
            f"the cache of --use_cache belongs to another ensemble; {' and '.join(differing)} differ{values}; "
            "name a new one"
        )


def announce_when_interrupted(cache: MutableMapping[str, Any] | None) -> None:
    """Let Ctrl-C say how much of the run is in the cache, or that there is none.

    Args:
        cache: lm-eval's key-value store, in which every score is committed as it is made.
    """
    if cache is None:
        Interruption.says = lambda: (
            "nothing was saved; with --use_cache PATH, a run goes on where it was stopped"
        )
        return
    path = getattr(cache, "filename", "the cache")
    Interruption.says = lambda: (
        f"{len(cache) - 1} scored requests are saved in {path}; the same command with the same --use_cache goes on "
        "from there"
    )
