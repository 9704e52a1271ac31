"""Run the notebook and keep what its cells print and draw: ``python docs/notebook.py``.

The cells are plain Python, run one after another beside the notebook; a cell's outputs are its printed text and the
figures it opened. No kernel is needed: Jupyter would bring ten packages for what is fifty lines here.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

NOTEBOOK = Path(__file__).parent / "tutorial.ipynb"
_DPI = 110


def source(cell: dict[str, Any]) -> str:
    """Return a cell's text; the format allows a list of lines."""
    return "".join(cell["source"])


def run(notebook: dict[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    """Run the code cells in ``folder`` and return the outputs of each, in the notebook's own format."""
    names: dict[str, Any] = {"__name__": "__main__"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        codes = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]
        return [_outputs(code, f"cell {number}", names) for number, code in enumerate(codes, start=1)]
    finally:
        os.chdir(before)


def _outputs(code: str, name: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    plt.close("all")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), names)
    text = printed.getvalue()
    outputs: list[dict[str, Any]] = []
    if text:
        outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    return [*outputs, *(_picture(number) for number in plt.get_fignums())]


def _picture(number: int) -> dict[str, Any]:
    png = io.BytesIO()
    plt.figure(number).savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    data = {"image/png": base64.b64encode(png.getvalue()).decode()}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def main() -> None:
    """Write the outputs into the notebook."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(cells, run(notebook, NOTEBOOK.parent), strict=True), 1):
        cell.update(execution_count=number, outputs=outputs)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
