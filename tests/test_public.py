"""The public face: every name has an example that runs, and none loads more than it needs."""

from __future__ import annotations

import copy
import doctest
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from test_model import PAIRS, instances

import lm_eval_lora_ensemble
from lm_eval_lora_ensemble import load_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError

RELEASE = Path(__file__).parent / "data" / "release_0_1_0"
CALLABLES = ("load_runs", "evaluate", "compare", "load_ensemble", "draw")


@pytest.fixture
def in_release(tmp_path, monkeypatch) -> Path:
    """A folder with ./base, ./ensemble and ./results, as the examples have it."""
    folder = Path(shutil.copytree(RELEASE, tmp_path / "work"))
    monkeypatch.chdir(folder)
    return folder


def doctests(thing: object) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(thing, globs={}) if test.examples]


@pytest.mark.parametrize("name", CALLABLES)
def test_every_public_functions_example_runs(name, in_release):
    found = doctests(getattr(lm_eval_lora_ensemble, name))
    assert found
    for test in found:
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert result.attempted and not result.failed


def test_the_loaded_ensembles_example_runs(in_release):
    from lm_eval_lora_ensemble.harness.loaded import LoadedEnsemble

    (test,) = doctests(LoadedEnsemble)
    assert not doctest.DocTestRunner().run(test).failed


@pytest.mark.parametrize("room", ["metrics", "figures"])
def test_every_function_of_a_public_room_has_an_example_that_runs(room, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = getattr(lm_eval_lora_ensemble, room)
    registry = lm_eval_lora_ensemble.metrics.METRICS
    monkeypatch.setattr(registry, "_metrics", dict(registry))  # what an example registers ends with the test
    for name in package.__all__:
        thing = getattr(package, name)
        if not callable(thing):
            continue
        found = doctests(thing)
        assert found or isinstance(thing, type), f"{room}.{name} has no example"
        for test in found:
            assert not doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed, name


LOADED = "import sys; print(sorted({'torch', 'lm_eval', 'numpy', 'matplotlib'} & set(sys.modules)))"


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import lm_eval_lora_ensemble", []),
        ("from lm_eval_lora_ensemble import load_runs, evaluate, compare, metrics", ["numpy"]),
        ("from lm_eval_lora_ensemble import figures; figures.plot_reliability", ["matplotlib", "numpy"]),
        # the proof that the ones above could fail
        ("from lm_eval_lora_ensemble import load_ensemble", ["lm_eval", "numpy", "torch"]),
    ],
)
def test_a_name_loads_what_it_needs_and_no_more(code, loaded):
    # the start-up file may have been run; what it imports is in the question too
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LOADED}"], capture_output=True, text=True, check=True
    )
    found = eval(done.stdout)
    assert [name for name in found if name != "matplotlib" or "matplotlib" in loaded] == loaded


def test_what_is_public_is_listed_and_nothing_else_is_there():
    assert set(lm_eval_lora_ensemble.__all__) <= set(dir(lm_eval_lora_ensemble))
    with pytest.raises(AttributeError, match="no attribute 'laod_runs'"):
        lm_eval_lora_ensemble.laod_runs  # noqa: B018


def test_loglikelihoods_are_those_of_hf(llama, ensemble):
    loaded = load_ensemble(str(llama), ensemble, device="cpu")
    contexts, continuations = zip(*PAIRS, strict=True)
    scores = loaded.loglikelihoods(contexts, continuations)
    assert scores.shape == (3, len(PAIRS)) and loaded.members == ("member_00", "member_01", "member_02")
    for i, name in enumerate(loaded.members):
        theirs = HFLM(pretrained=str(llama), peft=str(ensemble / name), device="cpu")
        expected = [value for value, _ in theirs.loglikelihood(instances(PAIRS), disable_tqdm=True)]
        np.testing.assert_allclose(scores[i], expected, atol=1e-4)


def test_a_device_is_found_where_none_is_named(llama, ensemble):
    loaded = load_ensemble(str(llama), ensemble)
    assert loaded.model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert np.isfinite(loaded.loglikelihoods(["The sky is"], [" blue"])).all()


def test_nothing_asked_is_nothing_answered_and_a_wrong_length_is_an_error(ensemble):
    loaded = load_ensemble(adapters=[str(ensemble / "member_00")], device="cpu")
    assert loaded.loglikelihoods([], []).shape == (1, 0)
    with pytest.raises(ValueError, match="zip"):
        loaded.loglikelihoods(["a"], [])


def test_paths_are_taken_and_nothing_to_score_is_named(llama, ensemble):
    loaded = load_ensemble(Path(llama), Path(ensemble), device="cpu")
    for contexts in (["a"], [""]):
        with pytest.raises(EnsembleError, match=r"continuations\[0\] is empty"):
            loaded.loglikelihoods(contexts, [""])
    for give_away in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="a loaded ensemble cannot be pickled"):
            give_away(loaded)
