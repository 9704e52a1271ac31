"""A mkdocs hook: formulas become MathML when the site is built, so that no script has to draw them.

``pymdownx.arithmatex`` finds ``$…$`` as GitHub does and leaves its TeX in an element of its own; browsers draw MathML
themselves.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# log, exp: TeX leaves a thin space after them, the converter none
_FUNCTION = re.compile(r"<mi>([a-z]{2,})</mi>")
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace a page's formulas."""
    content = _INLINE.sub(lambda found: _mathml(found[1]), content)
    return _BLOCK.sub(lambda found: _mathml(found[1], display="block"), content)


def _mathml(tex: str, display: str = "inline") -> str:
    return _FUNCTION.sub(
        r'<mi>\1</mi><mspace width="0.167em"/>', convert(html.unescape(tex), display=display)
    )
