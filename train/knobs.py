"""The admissible values of each recipe key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """Converts a YAML value or refuses it; ``expectation`` completes "it must be …"."""

    expectation: str
    convert: Callable[[Any], Any]

    def __call__(self, value: Any) -> Any:
        """Return the converted value, or raise ValueError or TypeError."""
        return self.convert(value)


def _ensure(condition: bool) -> None:
    if not condition:
        raise ValueError


def integer(least: int) -> Check:
    """A whole number, at least ``least``."""

    def convert(value: Any) -> int:
        _ensure(not isinstance(value, bool) and float(value) == int(float(value)) >= least)
        return int(float(value))

    return Check(f"a whole number of at least {least}", convert)


def number(least: float, below: float = float("inf"), *, positive: bool = False) -> Check:
    """A real number in [least, below), or (least, below) if ``positive``.

    YAML reads ``5e-6`` (no decimal point) as a string, so strings are converted too.
    """

    def convert(value: Any) -> float:
        _ensure(not isinstance(value, bool))
        result = float(value)
        _ensure(least <= result < below and not (positive and result == least))
        return result

    bound = f"more than {least:g}" if positive else f"at least {least:g}"
    return Check(f"a number, {bound}" + (f" and below {below:g}" if below < float("inf") else ""), convert)


def choice(*options: str) -> Check:
    """One of a few words."""

    def convert(value: Any) -> str:
        _ensure(value in options)
        return str(value)

    return Check("one of " + ", ".join(options), convert)


def text() -> Check:
    """A non-empty string."""

    def convert(value: Any) -> str:
        _ensure(isinstance(value, str) and bool(value.strip()))
        return str(value)

    return Check("text", convert)


def texts() -> Check:
    """A string, a comma-separated string, or a list of strings."""

    def convert(value: Any) -> tuple[str, ...]:
        words = value.split(",") if isinstance(value, str) else list(value or ())
        _ensure(all(isinstance(word, str) and word.strip() for word in words))
        return tuple(word.strip() for word in words)

    return Check("a name or a list of names", convert)


def flag() -> Check:
    """True or false."""

    def convert(value: Any) -> bool:
        _ensure(isinstance(value, bool))
        return bool(value)

    return Check("true or false", convert)


def optional(check: Check) -> Check:
    """The given check, or null."""
    return Check(f"{check.expectation}, or null", lambda value: None if value is None else check(value))


def _target_modules(value: Any) -> str | tuple[str, ...]:
    if value == "all-linear":
        return "all-linear"
    words: tuple[str, ...] = texts()(value)
    _ensure(bool(words))
    return words


def _layers(value: Any) -> tuple[int, ...] | None:
    """Read ``[0, 1, 5]``, ``7``, or a range ``"8-15"`` with both ends included."""
    if value is None:
        return None
    if isinstance(value, str):
        first, dash, last = value.partition("-")
        value = range(int(first), int(last if dash else first) + 1)
    elif isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    layers = tuple(integer(0)(layer) for layer in value)
    _ensure(bool(layers) and len(set(layers)) == len(layers))
    return layers


def _revision(value: Any) -> str | None:
    """A revision made of digits alone arrives from YAML as a number."""
    return None if value is None else text()(str(value))


CHECKS: dict[str, Check] = {
    "base_model": text(),
    "revision": Check("a branch, tag or commit, or null", _revision),
    "task": texts(),
    "include_path": optional(text()),
    "num_fewshot": optional(integer(0)),
    "objective": choice("answer", "choices"),
    "output": text(),
    "members": integer(1),
    "seed": integer(0),
    "initial_adapters": texts(),
    "rank": integer(1),
    "alpha": number(0, positive=True),
    "rslora": flag(),
    "dora": flag(),
    "dropout": number(0, 1),
    "target_modules": Check("a list of module names, or all-linear", _target_modules),
    "layers": Check("a list of layer numbers, a range such as 8-15, or null", _layers),
    "learning_rate": number(0, positive=True),
    "schedule": choice("constant", "linear", "cosine"),
    "warmup_steps": integer(0),
    "weight_decay": number(0),
    "lora_l2": number(0),
    "lora_b_l2": number(0),
    "gradient_clip": optional(number(0, positive=True)),
    "epochs": integer(1),
    "max_steps": optional(integer(1)),
    "early_stopping": optional(integer(1)),
    "batch_size": integer(1),
    "gradient_accumulation": integer(1),
    "max_length": optional(integer(2)),
    "truncate": choice("refuse", "left"),
    "train_limit": optional(integer(1)),
    "validation_limit": optional(integer(0)),
    "subset_seed": optional(integer(0)),
    "shuffle": flag(),
    "length_groups": flag(),
    "dtype": choice("auto", "float32", "bfloat16", "float16"),
    "quantization": choice("none", "4bit", "8bit"),
    "gradient_checkpointing": flag(),
    "engine": choice("auto", "joint", "plain"),
    "members_at_once": optional(integer(1)),
    "device": text(),
    "checkpoint_steps": optional(integer(1)),
    "keep_checkpoints": integer(1),
    "report_to": texts(),
}
