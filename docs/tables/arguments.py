"""The tables of reference/arguments.md, from the model's signature and the arguments' description in its docstring."""

from __future__ import annotations

import inspect
import re

from lm_eval_lora_ensemble.ensemble.quantization import ARGUMENTS
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from tables import markdown_table

_ARGUMENT = re.compile(r"^ {4}(\*{0,2}\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def table(name: str) -> str:
    """Return ``own``, a line an argument of the model, or ``quantised``, the names handed on to bitsandbytes."""
    if name == "quantised":
        return ", ".join(f"`{argument}`" for argument in ARGUMENTS) + "\n"
    rows = [("argument", "default", "meaning")]
    meanings = described()
    for argument, default in defaults().items():
        rows.append((f"`{argument}`", "–" if default is None else f"`{default}`", meanings[argument]))
    return markdown_table(rows)


def defaults() -> dict[str, object]:
    """Return the model's own arguments with their defaults, in the order of its signature."""
    parameters = list(inspect.signature(LoraEnsembleLM.__init__).parameters.values())[1:]
    return {one.name: one.default for one in parameters if one.kind is not one.VAR_KEYWORD}


def described() -> dict[str, str]:
    """Return what the docstring's section ``Args`` says of each argument, as one line of Markdown."""
    section = (inspect.getdoc(LoraEnsembleLM) or "").partition("Args:\n")[2].partition("\n\n")[0]
    return {name: _sentence(text) for name, text in _ARGUMENT.findall(section)}


def _sentence(text: str) -> str:
    """Return a description on one line, with a capital and a full stop, in Markdown's backquotes."""
    line = " ".join(text.split()).replace("``", "`").removesuffix(".")
    return f"{line[0].upper()}{line[1:]}."
