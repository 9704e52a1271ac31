"""One key of a recipe, in one line: its default, the rule its value obeys, and a sentence that says what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, field
from typing import Any

JsonSchema = dict[str, Any]


class Rule:
    """What a YAML value must be; converts it or refuses it.

    Args:
        expectation: completes "it must be …".
        convert: returns the value as the recipe holds it, or raises ValueError, TypeError or OverflowError.
        schema: the same in the words of JSON Schema, for editors.
    """

    def __init__(self, expectation: str, convert: Callable[[Any], Any], **schema: Any) -> None:
        self.expectation = expectation
        self.convert = convert
        self.schema: JsonSchema = schema


def key(default: Any, rule: Rule, meaning: str, *, section: str = "", operational: bool = False) -> Any:
    """Declare a key of the recipe, as a field of its dataclass.

    Args:
        default: its value where a recipe is silent; ``...`` if a recipe must name it.
        rule: what its value must be.
        meaning: one sentence, with the unit.
        section: the heading of the keys from here on.
        operational: it says how a run is carried out, not what is computed: it may change when a run goes on.
    """
    metadata = {"rule": rule, "meaning": meaning, "section": section, "operational": operational}
    return field(default=MISSING if default is ... else default, metadata=metadata)


def integer(least: int, most: int | None = None) -> Rule:
    """A whole number, at least ``least`` and at most ``most``."""

    def convert(value: Any) -> int:
        _ensure(not isinstance(value, bool) and float(value) == int(float(value)) >= least)
        _ensure(most is None or int(float(value)) <= most)
        return int(float(value))

    expectation = f"a whole number of at least {least}"
    if most is None:
        return Rule(expectation, convert, type="integer", minimum=least)
    return Rule(f"{expectation} and at most {most}", convert, type="integer", minimum=least, maximum=most)


def positive() -> Rule:
    """A real number above 0."""
    return Rule("a number, more than 0", _number(lambda x: x > 0), type="number", exclusiveMinimum=0)


def at_least(least: float) -> Rule:
    """A real number, ``least`` or more."""
    return Rule(
        f"a number of at least {least:g}", _number(lambda x: x >= least), type="number", minimum=least
    )


def nonnegative() -> Rule:
    """A real number, 0 or more."""
    return Rule("a number, at least 0", _number(lambda x: x >= 0), type="number", minimum=0)


def fraction() -> Rule:
    """A real number in [0, 1)."""
    return Rule(
        "a number, at least 0 and below 1",
        _number(lambda x: 0 <= x < 1),
        type="number",
        minimum=0,
        exclusiveMaximum=1,
    )


def interval() -> Rule:
    """The word ``epoch``, or a whole number of steps."""
    steps = integer(1)

    def convert(value: Any) -> int | str:
        return "epoch" if value == "epoch" else int(steps.convert(value))

    return Rule(
        "epoch, or a whole number of steps, at least 1", convert, anyOf=[{"const": "epoch"}, steps.schema]
    )


def course() -> Rule:
    """A place in the course of a run: a share of it below 1, or a whole number of steps."""
    share, steps = fraction(), integer(1)

    def convert(value: Any) -> float:
        number = share if not isinstance(value, bool) and float(value) < 1 else steps
        # 1.0 is neither a share below 1 nor a number of steps that somebody wrote
        _ensure(number is share or not isinstance(value, float))
        return number.convert(value)

    return Rule(
        "a share of the run below 1, or a whole number of steps", convert, anyOf=[share.schema, steps.schema]
    )


def choice(*options: str) -> Rule:
    """One of a few words."""

    def convert(value: Any) -> str:
        _ensure(value in options)
        return str(value)

    return Rule("one of " + ", ".join(options), convert, enum=list(options))


def text() -> Rule:
    """A non-empty string."""

    def convert(value: Any) -> str:
        _ensure(isinstance(value, str) and bool(value.strip()))
        return str(value)

    return Rule("text", convert, type="string", pattern=r"\S")


def texts(least: int = 0) -> Rule:
    """A string, a comma-separated string, or a list of at least so many strings; null is none."""

    def convert(value: Any) -> tuple[str, ...]:
        _ensure(isinstance(value, (str, list, tuple)) or value is None)
        words = value.split(",") if isinstance(value, str) else list(value or ())
        _ensure(len(words) >= least and all(isinstance(word, str) and word.strip() for word in words))
        return tuple(word.strip() for word in words)

    kinds = [text().schema, _list_of(text().schema, minItems=least)]
    return Rule("a name or a list of names", convert, anyOf=kinds if least else [*kinds, {"type": "null"}])


def flag() -> Rule:
    """True or false."""

    def convert(value: Any) -> bool:
        _ensure(isinstance(value, bool))
        return bool(value)

    return Rule("true or false", convert, type="boolean")


def optional(rule: Rule) -> Rule:
    """What the given rule says, or null."""
    return Rule(
        f"{rule.expectation}, or null",
        lambda value: None if value is None else rule.convert(value),
        anyOf=[rule.schema, {"type": "null"}],
    )


def commit() -> Rule:
    """A branch, tag or commit; one made of digits alone arrives from YAML as a number."""

    def convert(value: Any) -> str:
        _ensure(isinstance(value, (str, int, float)) and not isinstance(value, bool))
        return str(text().convert(str(value)))

    return Rule("a branch, tag or commit", convert, type=["string", "number"], pattern=r"\S")


def module_names() -> Rule:
    """Names of modules, or PEFT's word for all linear layers but the head."""
    names = texts(least=1)

    def convert(value: Any) -> str | tuple[str, ...]:
        return "all-linear" if value == "all-linear" else names.convert(value)

    return Rule("a list of module names, or all-linear", convert, **names.schema)


def layer_numbers() -> Rule:
    """``[0, 1, 5]``, ``7``, or a range ``8-15`` with both ends included."""

    def convert(value: Any) -> tuple[int, ...]:
        if isinstance(value, str):
            first, dash, last = value.partition("-")
            value = range(int(first), int(last if dash else first) + 1)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        numbers = tuple(integer(0).convert(layer) for layer in value)
        _ensure(bool(numbers) and len(set(numbers)) == len(numbers))
        return numbers

    number = integer(0).schema
    return Rule(
        "a list of layer numbers, a range such as 8-15",
        convert,
        anyOf=[
            number,
            {"type": "string", "pattern": r"^\d+(-\d+)?$"},
            _list_of(number, minItems=1, uniqueItems=True),
        ],
    )


def _number(admissible: Callable[[float], bool]) -> Callable[[Any], float]:
    """Read a finite real number. YAML reads ``5e-6`` (no decimal point) as a string, so strings are converted too."""

    def convert(value: Any) -> float:
        _ensure(not isinstance(value, bool))
        number = float(value)
        _ensure(abs(number) < float("inf") and admissible(number))
        return number

    return convert


def _list_of(items: JsonSchema, **bounds: Any) -> JsonSchema:
    return {"type": "array", "items": items, **bounds}


def _ensure(condition: bool) -> None:
    if not condition:
        raise ValueError
