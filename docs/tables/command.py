"""The page reference/command.md, from the parsers of the verbs."""

from __future__ import annotations

import argparse
import importlib

from lm_eval_lora_ensemble.cli import VERBS
from tables import markdown_table

_REPEATED = {"?": "[{}]", "*": "[{} …]", "+": "{} …"}


def table(name: str) -> str:
    """Return every verb's section (``verbs``): what it does, how it is called, a line an argument."""
    if name != "verbs":
        raise KeyError(name)
    return "\n".join(_section(verb, *about) for verb, about in VERBS.items())


def actions(module: str) -> list[argparse.Action]:
    """Return the arguments that a verb's module adds to its parser, positional ones first."""
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(module).add_arguments(parser)
    # argparse has no public list; the private one is as old as the module
    return sorted(parser._actions, key=lambda action: bool(action.option_strings))


def _section(verb: str, module: str, summary: str) -> str:
    found = actions(module)
    asked = [_shown(action) for action in found if action.required or not action.option_strings]
    options = ["[options]"] if len(asked) < len(found) else []
    usage = " ".join(["lora-ensemble", verb, *asked, *options])
    rows = [("argument", "meaning"), *((f"`{_shown(action)}`", _meaning(action)) for action in found)]
    said = f"{summary[0].upper()}{summary[1:]}."
    return f"## {verb}\n\n{said}\n\n```text\n{usage}\n```\n\n{markdown_table(rows)}"


def _shown(action: argparse.Action) -> str:
    """Return an argument as one types it: ``--bins BINS``, ``RECIPE``, ``[key=value …]``."""
    value = str(action.metavar or (action.dest.upper() if action.option_strings else action.dest))
    if action.choices and not action.metavar:
        value = f"{{{','.join(map(str, action.choices))}}}"
    if isinstance(action.nargs, str):
        value = _REPEATED[action.nargs].format(value)
    return " ".join([*action.option_strings[-1:], *([] if action.nargs == 0 else [value])])


def _meaning(action: argparse.Action) -> str:
    """Return what ``--help`` says of an argument; a star in it is a star."""
    said = (action.help or "") % {**vars(action), "prog": "lora-ensemble"}
    required = " (required)" if action.required and action.option_strings else ""
    return said.replace("*", r"\*") + required
