"""docs/recipe.md and the schema for editors say what train/recipe.py does, no more and no less."""

import json
import re

import jsonschema
import pytest
import yaml

from lm_eval_lora_ensemble.disk import recipes_folder
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train import recipe_docs
from lm_eval_lora_ensemble.train.recipe import RULES, Recipe

MINIMAL = {"base_model": "some/model", "task": "arc_easy"}
SCHEMA = recipes_folder().parent / "recipe.schema.json"
BUNDLED = sorted(recipes_folder().glob("*.yaml"))


@pytest.fixture(scope="module")
def editor():
    """What an editor does with the schema."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("path", recipe_docs.files(), ids=lambda path: path.name)
def test_generated_files_are_current(path):
    command = "python -m lm_eval_lora_ensemble.train.recipe_docs"
    assert path.read_text(encoding="utf-8") == recipe_docs.files()[path], f"write it again: {command}"


def test_every_key_is_said_in_a_sentence():
    rows = re.findall(r"^\| `(\w+)`°? \| (.+) \| (.+) \| (.+) \|$", recipe_docs.page(), flags=re.M)
    assert [row[0] for row in rows] == list(RULES)
    assert all(row[3][0].isalpha() and row[3].endswith((".", "…")) for row in rows)


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_bundled_recipes_name_the_schema_and_obey_it(path, editor):
    text = path.read_text(encoding="utf-8")
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named and (path.parent / named[1]).resolve() == SCHEMA.resolve()
    editor.validate(yaml.safe_load(text))


def test_a_resolved_recipe_obeys_the_schema(editor):
    editor.validate(yaml.safe_load(Recipe.from_mapping(MINIMAL).as_yaml()))


VALUES = {
    "members": [1, 5, 0, -1, 2.5, True, None, "five"],
    "num_fewshot": [None, 0, 3, -1, "few"],
    "learning_rate": [1, 2e-4, 0, -1, None, "fast"],
    "weight_decay": [0, 0.1, -0.1],
    "dropout": [0, 0.5, 1, 1.5],
    "gradient_clip": [None, 0.3, 0],
    "objective": ["answer", "choices", "answers", None],
    "quantization": ["4bit", 4],
    "dtype": ["bfloat16", "bf16"],
    "rslora": [True, False, "yes please", 1],
    "output": ["there", "", " ", None, 3],
    "revision": [None, "main", 20240101, [1]],
    "task": ["one", ["one", "two"], [], None, "", [1], {"one": 1}],
    "initial_adapters": [None, [], "folder", ["folder"], [""]],
    "target_modules": ["all-linear", "q_proj", ["q_proj"], [], 3],
    "layers": [None, 0, 7, "7", "8-15", [0, 1], "8-", "a", [], [1, 1], -1, [-1], True],
    "learning_rat": [1],
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in VALUES.items() for v in values])
def test_the_schema_accepts_what_the_recipe_accepts(name, value, editor):
    try:
        Recipe.from_mapping({**MINIMAL, name: value})
        accepted = True
    except EnsembleError:
        accepted = False
    assert editor.is_valid({**MINIMAL, name: value}) == accepted


def test_the_schema_wants_what_has_no_default(editor):
    for name in MINIMAL:
        assert not editor.is_valid({key: value for key, value in MINIMAL.items() if key != name})
