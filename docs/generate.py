"""Write what the pages of this folder take from the code.

    python docs/generate.py

A page has ``<!-- SUBJECT: NAME -->`` where a table begins and ``<!-- end -->`` where it ends; the module
``tables/SUBJECT.py`` knows what stands between. A test holds every page against the code. docs/recipe.md is written by
``python -m lm_eval_lora_ensemble.train.recipe_docs``, whole and with the schema for editors, and the notebook's outputs
by ``python docs/notebook.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from tables import arguments, command, draw, metrics

DOCS = Path(__file__).parent

SUBJECTS: Mapping[str, Callable[[str], str]] = {
    "arguments": arguments.table,
    "command": command.table,
    "draw": draw.table,
    "metrics": metrics.table,
}
PAGES = ("draw.md", "metrics.md", "reference/arguments.md", "reference/command.md")

_PLACE = re.compile(rf"(<!-- ({'|'.join(SUBJECTS)}): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """Return a page's text with everything between its markers as the code has it."""
    return _PLACE.sub(lambda place: place[1] + SUBJECTS[place[2]](place[3]) + place[4], page)


if __name__ == "__main__":
    for name in PAGES:
        path = DOCS / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
