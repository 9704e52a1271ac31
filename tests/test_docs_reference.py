"""What docs/ takes from the code is what the code says: generated pages, the Python reference, the notebook."""

from __future__ import annotations

import inspect
import json
import re
import shutil

import pytest
from conftest import DATA, PROJECT

import lm_eval_lora_ensemble
from lm_eval_lora_ensemble import figures, metrics
from lm_eval_lora_ensemble.cli import VERBS
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM

DOCS = PROJECT / "docs"
PAGES = ("draw.md", "metrics.md", "reference/arguments.md", "reference/command.md")


@pytest.mark.parametrize("page", PAGES)
def test_generated_tables_are_current(page, docs_module):
    generate = docs_module("generate")
    assert set(generate.PAGES) == set(PAGES)
    text = (DOCS / page).read_text(encoding="utf-8")
    assert generate.filled(text) == text, "write it again: python docs/generate.py"


def test_no_marker_is_left_out(docs_module):
    """A mistyped subject would leave its table as it is, for ever."""
    subjects = docs_module("generate").SUBJECTS
    for path in DOCS.rglob("*.md"):
        opened = re.findall(r"<!-- (\w+): \w+ -->", path.read_text(encoding="utf-8"))
        if path.relative_to(DOCS).as_posix() in PAGES:
            assert opened and set(opened) <= set(subjects)
        else:
            assert not set(opened) & set(subjects)


def test_a_page_that_was_changed_by_hand_is_found_out(docs_module):
    generate = docs_module("generate")
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    changed = text.replace("↓ | golds |", "↑ | golds |")
    assert changed != text
    assert generate.filled(changed) == text


def test_every_argument_of_the_model_is_described(docs_module):
    arguments = docs_module("tables.arguments")
    parameters = set(inspect.signature(LoraEnsembleLM.__init__).parameters) - {"self", "kwargs"}
    assert set(arguments.defaults()) == parameters
    assert set(arguments.described()) == {*parameters, "**kwargs"}
    assert all(len(sentence.split()) > 3 for sentence in arguments.described().values())


def test_every_verb_and_every_option_is_described(docs_module):
    command = docs_module("tables.command")
    page = command.table("verbs")
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == list(VERBS)
    for verb, (module, _) in VERBS.items():
        section = page.partition(f"## {verb}\n")[2].partition("\n## ")[0]
        for action in command.actions(module):
            word = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
            assert f"`{word}" in section or f"`[{word}" in section
            assert action.help, f"{verb} {word} says nothing"


def test_the_python_reference_has_every_public_name():
    pages = [(DOCS / "reference" / name).read_text(encoding="utf-8") for name in ("api.md", "functions.md")]
    shown = set(re.findall(r"^::: (?:[\w.]+\.)?(\w+)$", "\n".join(pages), re.MULTILINE))
    rooms = {"__version__", "figures", "metrics", "METRICS"}
    public = {*lm_eval_lora_ensemble.__all__, *metrics.__all__, *figures.__all__} - rooms
    assert public <= shown, f"missing in docs/reference: {public - shown}"


def test_the_notebook_prints_what_is_stored_in_it_and_draws_its_figures(docs_module, tmp_path):
    runner = docs_module("notebook")
    notebook = json.loads(runner.NOTEBOOK.read_text(encoding="utf-8"))
    # where it finds the results of the checkout by the same relative path
    shutil.copytree(DATA / "smollm2_arc_easy", tmp_path / "tests" / "data" / "smollm2_arc_easy")
    (tmp_path / "docs").mkdir()
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = runner.run(notebook, tmp_path / "docs")
    assert sum(out["output_type"] == "display_data" for cell in found for out in cell) == 3
    for before, now in zip(stored, found, strict=True):
        assert [out["output_type"] for out in before] == [out["output_type"] for out in now]
        assert [out.get("text") for out in before] == [out.get("text") for out in now], (
            "run: python docs/notebook.py"
        )
        # a figure's bytes are those of one release of matplotlib, but one without a curve is smaller
        for out in now:
            assert "data" not in out or len(out["data"]["image/png"]) > 20_000
    assert not list((tmp_path / "docs").iterdir())


def test_the_notebook_is_in_order(docs_module):
    notebook = json.loads(docs_module("notebook").NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
