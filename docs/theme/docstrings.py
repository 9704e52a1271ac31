"""A griffe extension: this package's docstrings, as the site's parser reads them.

They say ``Example:`` where the parser knows ``Examples:``, and name other objects by Sphinx' roles, which Markdown does
not have: a role becomes a link where the site has that object, and its name where it has not.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|data|meth|mod|attr):`(~?)\.?([\w.]+)`")


class ReadableDocstrings(Extension):
    """Rewrites every docstring once it is read from the source."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is None:
            return
        scope = obj if obj.is_module else obj.module
        text = _EXAMPLE.sub("Examples:", obj.docstring.value)
        obj.docstring.value = _ROLE.sub(lambda role: _reference(role[1], role[2], scope.path), text)


def _reference(short: str, name: str, module: str) -> str:
    shown = name.rpartition(".")[2] if short else name
    target = name if "." in name else f"{module}.{name}"
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
