"""Recipes: what is accepted, what is refused and how, and that the paper's recipes are the paper's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_lora_ensemble.disk import recipes_folder
from lm_eval_lora_ensemble.errors import EnsembleError, one_line
from lm_eval_lora_ensemble.train.recipe import OPERATIONAL, RULES, Recipe

MINIMAL = {"base_model": "some/model", "task": "arc_easy"}
BUNDLED = sorted(path.stem for path in recipes_folder().glob("*.yaml"))

# arXiv 2402.12264 and its code
PAPER = {
    "base_model": "mistralai/Mistral-7B-v0.1",
    "target_modules": ("q_proj", "v_proj"),
    "rank": 8,
    "alpha": 32.0,
    "rslora": False,
    "dora": False,
    "dropout": 0.0,
    "layers": None,
    "objective": "answer",
    "members": 5,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup_steps": 0,
    "batch_size": 8,
    "gradient_accumulation": 1,
    "gradient_clip": 0.3,
    "lora_l2": 1.0,
    "lora_b_l2": 0.0,
    "num_fewshot": 0,
    "max_steps": None,
    "early_stopping": None,
    "train_limit": None,
}
PAPER_RECIPES = {
    "paper_mistral7b_commonsense_qa": {
        "task": ("paper_commonsense_qa",),
        "learning_rate": 5e-6,
        "epochs": 10,
        "max_length": 128,
    },
    "paper_mistral7b_mmlu": {
        "task": ("paper_mmlu_stem",),
        "learning_rate": 1.25e-6,
        "epochs": 15,
        "max_length": 512,
    },
}


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_paper_recipes_hold_the_papers_values(name):
    recipe = Recipe.load(name)
    expected = PAPER | PAPER_RECIPES[name]
    assert {key: getattr(recipe, key) for key in expected} == expected


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_recipes_open_with_the_commands_that_use_them(name):
    text = (recipes_folder() / f"{name}.yaml").read_text()
    head = text.partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"lora-ensemble train {name}" in head
    assert Recipe.load(name) == Recipe.load(recipes_folder() / f"{name}.yaml")


def test_every_default_obeys_its_rule():
    recipe = Recipe.from_mapping(MINIMAL)
    for key, value in recipe.as_mapping().items():
        assert RULES[key].convert(value) == getattr(recipe, key), key


def test_overrides_win_and_read_as_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("base_model: m\ntask: [a, b]\nlearning_rate: 5e-6\nmembers: 3\n")
    recipe = Recipe.load(path, ["members=4", "layers=8-11", "target_modules=all-linear", "max_length=null"])
    assert recipe.task == ("a", "b")
    assert recipe.learning_rate == 5e-6  # YAML itself reads "5e-6" as a string
    assert (recipe.members, recipe.layers, recipe.target_modules) == (4, (8, 9, 10, 11), "all-linear")
    assert recipe.max_length is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ({"zzzzzz": 1}, "unknown key 'zzzzzz'; known keys: base_model"),
        ({"objective": "answers"}, "objective is 'answers', it must be one of answer, choices"),
        ({"choice_scores": "bytes"}, "choice_scores is 'bytes', it must be one of sum, chars"),
        (
            {"choice_temperature": 0, "objective": "choices"},
            "choice_temperature is 0, it must be a number of at least 1e-06",
        ),
        ({"choice_scores": "chars"}, "choice_scores is for objective=choices, not for answer"),
        ({"choice_temperature": 2}, "choice_temperature is for objective=choices, not for answer"),
        ({"members": 0}, "members is 0, it must be a whole number of at least 1"),
        ({"members": 2.5}, "members is 2.5, it must be a whole number"),
        (
            {"members": 1e9},
            "members is 1000000000.0, it must be a whole number of at least 1 and at most 1000",
        ),
        ({"swa_start": 1.0, "keep_snapshots": 2}, "swa_start is 1.0, it must be a share of the run below 1"),
        ({"members": True}, "members is True"),
        ({"dropout": 1}, "dropout is 1, it must be a number, at least 0 and below 1"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', it must be a number, more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"rank": float("inf")}, "rank is inf"),
        ({"layers": "7-3"}, "layers is '7-3'"),
        ({"layers": [1, 1]}, "layers is [1, 1]"),
        ({"rslora": "yes please"}, "rslora is 'yes please', it must be true or false"),
        ({"task": None}, "no task; add a line 'task: …'"),
        ({"initial_adapters": ["a", "b"]}, "initial_adapters names 2 folders for 5 members"),
        ({"early_stopping": 1, "validation_limit": 0}, "early_stopping needs validation documents"),
    ],
)
def test_mistakes_are_named_in_one_line(values, message):
    with pytest.raises(EnsembleError) as caught:
        Recipe.from_mapping(MINIMAL | values, where="here.yaml")
    assert str(caught.value).startswith("here.yaml: ")
    assert message in str(caught.value)
    assert one_line(caught.value) == str(caught.value)


def test_unreadable_sources_are_refused(tmp_path):
    with pytest.raises(EnsembleError, match=r"neither a file nor a bundled recipe \(.*quickstart"):
        Recipe.load("no_such_recipe")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(EnsembleError, match="cannot be read"):
        Recipe.load(broken)
    broken.write_text("just text")
    with pytest.raises(EnsembleError, match="holds no key: value lines"):
        Recipe.load(broken)
    with pytest.raises(EnsembleError, match="write key=value"):
        Recipe.load("quickstart", ["members"])


@given(
    members=st.integers(1, 99),
    rate=st.floats(1e-9, 1.0),
    layers=st.none() | st.lists(st.integers(0, 80), min_size=1, unique=True),
    task=st.lists(st.text("abc_", min_size=1), min_size=1, max_size=3),
)
def test_a_resolved_recipe_reads_back_as_itself(members, rate, layers, task):
    import yaml

    recipe = Recipe.from_mapping(
        {"base_model": "m", "task": task, "members": members, "learning_rate": rate, "layers": layers}
    )
    assert Recipe.from_mapping(yaml.safe_load(recipe.as_yaml())) == recipe


def test_differences_ignore_how_a_run_is_carried_out():
    recipe = Recipe.from_mapping(MINIMAL)
    moved = Recipe.from_mapping(MINIMAL | {"output": "elsewhere", "device": "cpu", "checkpoint_steps": 7})
    other = Recipe.from_mapping(MINIMAL | {"rank": 4, "seed": 1})
    assert recipe.differences(moved) == []
    assert recipe.differences(other) == ["seed", "rank"]
    assert not OPERATIONAL & set(recipe.as_mapping(operational=False))
