"""The registry of methods, their options, and the page that is made of both."""

from __future__ import annotations

import doctest
from importlib.metadata import EntryPoint

import pytest
from conftest import PROJECT

from lm_eval_lora_ensemble.ensemble import manifest
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior import generators, options, registry
from lm_eval_lora_ensemble.posterior.options import Option, resolve, split_words
from lm_eval_lora_ensemble.posterior.plan import Settings
from lm_eval_lora_ensemble.posterior.registry import METHODS, method


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """What a test registers ends with it."""
    monkeypatch.setattr(METHODS, "_methods", dict(METHODS))


def test_the_page_has_every_method_and_option(docs_module):
    page = (PROJECT / "docs" / "draw.md").read_text(encoding="utf-8")
    for one in docs_module("tables.draw").built_in():
        assert f"| `{one.name}` | {one.title} |" in page
        assert all(f"| `{one.name}` | `{option}` |" in page for option in one.options)
        assert f"**{one.name}**" in page, "a paragraph says what it draws"


@pytest.mark.parametrize("module", [registry, options, generators, manifest])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    ("option", "given", "value"),
    [
        (Option(5, ""), "7", 7),
        (Option(5, ""), 7, 7),
        (Option(0.5, ""), "1e-3", 0.001),
        (Option(0.5, ""), 1, 1.0),
        (Option(None, "", int), "none", None),
        (Option(None, "", int), None, None),
        (Option(False, ""), "True", True),
        (Option(True, ""), False, False),
        (Option("own", "", choices=("own", "gold")), "gold", "gold"),
        (Option("a", ""), "", ""),
        (Option((), "", lambda text: tuple(text.split(","))), "a,b", ("a", "b")),
    ],
)
def test_options_read_texts_and_values(option, given, value):
    found = option.parse("it", given)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("option", "given", "said"),
    [
        (Option(5, ""), "5.0", "it=5.0: give a whole number"),
        (Option(5, ""), 5.5, "it=5.5: give a whole number"),
        (Option(5, ""), True, "it=True: give a whole number"),
        (Option(5, ""), "none", "it=none: give a whole number"),
        (Option(5, "", minimum=1), "0", "it=0: give a whole number from 1"),
        (Option(0.1, "", minimum=0, maximum=1), "1.5", "it=1.5: give a number from 0 to 1"),
        (Option(0.1, ""), "nan", "it=nan: give a number"),
        (Option(0.1, ""), "inf", "it=inf: give a number"),
        (Option(False, ""), "maybe", "it=maybe: give true or false"),
        (Option("own", "", choices=("own", "gold")), "glod", "give own or gold; did you mean gold"),
        (Option(0.1, ""), "1\n2", "it=1 2: give a number"),
    ],
)
def test_malformed_values_are_refused_in_one_line(option, given, said):
    with pytest.raises(EnsembleError, match=said) as refused:
        option.parse("it", given)
    assert "\n" not in str(refused.value)


def test_unknown_options_and_words_are_refused():
    with pytest.raises(EnsembleError, match="x has no option 'anchor'; did you mean anchors"):
        resolve({"anchors": Option(64, "")}, {"anchor": 3}, "x")
    with pytest.raises(EnsembleError, match="x has no option 'y'; there are none"):
        resolve({}, {"y": 3}, "x")
    with pytest.raises(EnsembleError, match="a is given twice: 1 and 2"):
        split_words(["a=1", "a=2"])
    assert split_words(["model_args=dtype=float32,device=cpu"]) == {"model_args": "dtype=float32,device=cpu"}


def test_a_method_that_fits_on_a_task_needs_one():
    method(name="needy", title="", needs="adapter", task=True)(lambda source, data: None)
    with pytest.raises(EnsembleError, match="needy fits on a task; give task=NAME"):
        Settings.of(METHODS["needy"], {})
    found = Settings.of(METHODS["needy"], {"task": "arc_easy", "limit": "9"})
    assert found.of_the_fit["task"] == "arc_easy" and found.of_the_fit["limit"] == 9
    with pytest.raises(EnsembleError, match="no option 'kept'"):
        Settings.of(METHODS["needy"], {"task": "arc_easy", "kept": "steps"})


def test_names_of_others_are_refused():
    def register(name, **options):
        method(name=name, title="", needs="adapter", options=options)(lambda source, data: None)

    for name in ("Swag", "s-wag", ""):
        with pytest.raises(EnsembleError, match="a method cannot be called"):
            register(name)
    with pytest.raises(EnsembleError, match=r"'swag' is registered by .*methods\.swag already"):
        register("swag")
    with pytest.raises(EnsembleError, match="the option 'seed' of mine is the command's already"):
        register("mine", seed=Option(0, ""))
    register("mine")
    register("mine")  # as a notebook's cell does


def test_a_broken_module_of_somebody_elses_is_left_out_with_a_warning(monkeypatch, caplog):
    broken = EntryPoint("broken", "no_such_module_here", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    assert not list(registry.Registry())  # the package's own are imported already and registered elsewhere
    assert "the posteriors of no_such_module_here cannot be loaded (ModuleNotFoundError" in caplog.text
