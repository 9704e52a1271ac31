"""A mkdocs hook: the notebook becomes a page, with the outputs that are stored in it.

The page is Markdown like any other, so that search, formulas and links work in it; figures become files beside it.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_NOTEBOOK, _PAGE = "tutorial.ipynb", "tutorial.md"


def on_files(files: Any, *, config: Any) -> Any:
    """Add the page and its figures."""
    notebook = json.loads((Path(config.docs_dir) / _NOTEBOOK).read_text(encoding="utf-8"))
    parts: list[str] = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text'])}```")
                continue
            name = f"images/tutorial-{len(parts)}.png"
            png = base64.b64decode(output["data"]["image/png"])
            files.append(File.generated(config, name, content=png))
            parts.append(f"![What the cell above draws]({name})")
    parts.append(f"*This page is [a notebook]({_NOTEBOOK}): download it and put your own results in.*")
    files.append(File.generated(config, _PAGE, content="\n\n".join(parts)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let other pages' links to the notebook lead to its page."""
    return markdown if page.file.src_uri == _PAGE else markdown.replace(f"{_NOTEBOOK})", f"{_PAGE})")
