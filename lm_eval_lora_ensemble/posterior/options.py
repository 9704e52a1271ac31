"""A method's options: what each means, its default, and how ``key=value`` becomes a value of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_lora_ensemble.errors import EnsembleError, nearest, one_line

_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")
_NOTHING = ("none", "null", "")
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        default: its value where nothing is said; None for a value that the method finds itself.
        help: its meaning, for docs/draw.md and for messages.
        type: ``int``, ``float``, ``bool``, ``str``, or a function of the text that raises ``ValueError``; left out,
            the type of ``default``.
        choices: the only values there are, if not empty.
        minimum, maximum: of numbers, both allowed.

    Example:
        >>> Option(64, "number of anchor documents", minimum=1).parse("anchors", "32")
        32
    """

    default: Any
    help: str
    type: Callable[[str], Any] | None = None
    choices: Sequence[Any] = ()
    minimum: float | None = None
    maximum: float | None = None

    @property
    def kind(self) -> Callable[[str], Any]:
        """The type that a text is read as."""
        if self.type is not None:
            return self.type
        return str if self.default is None else type(self.default)

    @property
    def expectation(self) -> str:
        """What a value has to be, in words."""
        if self.choices:
            return " or ".join(f"`{choice}`" for choice in self.choices)
        words = _WORDS.get(self.kind, "a value")
        if self.minimum is not None and self.maximum is not None:
            return f"{words} from {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{words} from {self.minimum:g}"
        return words if self.maximum is None else f"{words} up to {self.maximum:g}"

    def parse(self, name: str, value: Any) -> Any:
        """Return the value that a text, or a value from Python, stands for.

        Args:
            name: the option's, for the message.
            value: as it was given.

        Raises:
            EnsembleError: it is none of this option's.
        """
        if self.default is None and (value is None or str(value).lower() in _NOTHING):
            return None
        try:
            parsed = _read(value, self.kind)
            if self.choices and parsed not in self.choices:
                raise ValueError
            low, high = (
                -math.inf if self.minimum is None else self.minimum,
                math.inf if self.maximum is None else self.maximum,
            )
            if isinstance(parsed, (int, float)) and not low <= parsed <= high:
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            near = nearest(str(value), map(str, self.choices)) if self.choices else None
            hint = f"; did you mean {near}?" if near else ""
            expectation = self.expectation.replace("`", "")
            raise EnsembleError(f"{name}={one_line(value)}: give {expectation}{hint}") from None
        return parsed


def _read(value: Any, kind: Callable[[str], Any]) -> Any:
    """Read a text as ``kind``; a value from Python must be one already."""
    if kind is bool:
        if isinstance(value, bool):
            return value
        word = str(value).lower()
        if word not in (*_TRUE, *_FALSE):
            raise ValueError
        return word in _TRUE
    if isinstance(value, bool):
        raise ValueError
    if kind is int:
        number = int(value)
        if not isinstance(value, str) and number != value:
            raise ValueError
        return number
    if kind is float:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    return kind(value if isinstance(value, str) or kind is not str else str(value))


def split_words(words: Iterable[str]) -> dict[str, str]:
    """Return ``key=value …`` as a mapping.

    Raises:
        EnsembleError: a word without ``=``, or a key twice.
    """
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise EnsembleError(f"{one_line(word)!r} is not of the form key=value")
        if key in found:
            raise EnsembleError(f"{one_line(key)} is given twice: {found[key]} and {value}")
        found[key] = value
    return found


def resolve(options: Mapping[str, Option], given: Mapping[str, Any], of: str) -> dict[str, Any]:
    """Return every option's value, in the options' order.

    Args:
        options: what there is.
        given: what was asked for, texts or values.
        of: whose options they are, for the message.

    Raises:
        EnsembleError: an option that there is not, or a value that it cannot have.

    Example:
        >>> resolve({"K": Option(5, "deviations"), "scale": Option(0.5, "of the covariance")}, {"K": "8"}, "swag")
        {'K': 8, 'scale': 0.5}
    """
    for name in given:
        if name not in options:
            near = nearest(name, options)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(options) or 'none'}"
            raise EnsembleError(f"{of} has no option {one_line(name)!r}; {hint}")
    return {
        name: option.parse(name, given[name]) if name in given else option.default
        for name, option in options.items()
    }
