"""A mkdocs hook: links out of docs/ lead to the repository.

On GitHub a page links to ``../CHANGELOG.md`` or to a script beside it; the site has neither. What exists in the
checkout but not on the site is looked at where it is: in the repository. Any other link is left for mkdocs to judge.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

_FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)\s#:]+)(?P<rest>[^)]*)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrite a page's links, those in blocks of code excepted."""
    parts, last = [], 0
    for block in _FENCED.finditer(markdown):
        parts += [_rewritten(markdown[last : block.start()], page, config, files), block[0]]
        last = block.end()
    return "".join([*parts, _rewritten(markdown[last:], page, config, files)])


def _rewritten(text: str, page: Any, config: Any, files: Any) -> str:
    def link(found: re.Match[str]) -> str:
        docs = Path(config.docs_dir)
        folder = posixpath.dirname(page.file.src_uri)
        target = posixpath.normpath(posixpath.join(folder, found["path"]))
        on_site = files.get_file_from_path(target)
        if (on_site and on_site.inclusion.is_included()) or not (docs / target).exists():
            return found[0]
        kind = "raw" if found["image"] else "tree" if (docs / target).is_dir() else "blob"
        path = posixpath.normpath(posixpath.join(docs.name, target))
        return f"{found['image']}[{found['text']}]({config.repo_url}/{kind}/main/{path}{found['rest']})"

    return _LINK.sub(link, text)
