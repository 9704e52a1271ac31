"""4-bit and 8-bit base models on the CPU, by flag and as a folder, against ``hf`` on the same quantised weights."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import random_adapters, tiny_model, tiny_tokenizer
from test_model import PAIRS, hf, instances, lora

from lm_eval_lora_ensemble.ensemble import quantization
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.cache import identity_of
from lm_eval_lora_ensemble.train import base as training

pytest.importorskip("bitsandbytes")

KINDS: dict[str, dict[str, object]] = {
    "4bit": {"load_in_4bit": True},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "8bit": {"load_in_8bit": True},
    "8bit without outliers": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
# LLM.int8 takes a column out of the 8-bit product if any token of the pass exceeds the threshold in it: a score
# depends on what else is in the pass, in `hf` too, so packed rows cannot be exact and the trial says so
BATCH_DEPENDENT = "8bit"
ATOL = 1e-4
"""Nats a request, float32 outside the quantised layers; measured 2e-5. Quantising itself moves scores by whole nats."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose widths are multiples of bitsandbytes' blocks of 64."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    return tiny_model(folder, "llama", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def members(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapters(base, tmp_path_factory.mktemp("ensemble") / "two", 2)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def quantised(kind: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as its owner would publish it quantised, under the same name."""
    folder = tmp_path_factory.mktemp(kind) / base.name
    settings = transformers.BitsAndBytesConfig(**KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(quantised: Path, members: Path) -> np.ndarray:
    """What ``hf`` on the quantised folder scores with each adapter, [requests, N]."""
    columns = []
    for member in sorted(members.iterdir()):
        found = hf(quantised, member).loglikelihood(instances(PAIRS), disable_tqdm=True)
        columns.append([value for value, _ in found])
    return np.array(columns).T


def scores(model) -> np.ndarray:
    return np.array([value.members for value, _ in model.loglikelihood(instances(PAIRS), disable_tqdm=True)])


def linear_kinds(model) -> set[str]:
    """Return the classes of the decoder's feed-forward layers, which no adapter wraps here."""
    return {type(layer.mlp.up_proj).__name__ for layer in model.model.get_base_model().model.layers}


@pytest.mark.parametrize("path", ["packed", "plain"])
@pytest.mark.parametrize("how", ["flag", "folder"])
def test_scores_are_hfs_on_the_quantised_folder(kind, quantised, members, theirs, how, path):
    model = lora(members, **(KINDS[kind] if how == "flag" else {"pretrained": str(quantised)}))
    if path == "plain":
        model._packed_models.choose = lambda _: "the test wants the other path"
    found = scores(model)
    assert linear_kinds(model) == {"Linear8bitLt" if "8bit" in kind else "Linear4bit"}
    assert (model.work.n_positions > 0) == (path == "packed" and kind != BATCH_DEPENDENT)
    np.testing.assert_allclose(found, theirs, atol=ATOL)
    assert np.ptp(found, axis=1).max() > 0.01


@pytest.mark.parametrize("quantised_as", ["8bit", "8bit without outliers"])
def test_outliers_make_hfs_own_scores_depend_on_the_batch(base, members, quantised_as):
    """Why 8-bit layers with outliers are scored request by request, and what to say to have them packed."""
    model = lora(members, members=1, **KINDS[quantised_as])
    model._packed_models.choose = lambda _: "the test wants the other path"
    alone = scores(model)
    model.batch_size_per_gpu = 8
    together = scores(model)
    changed = np.abs(alone - together).max()
    assert changed > 0.01 if quantised_as == BATCH_DEPENDENT else changed < ATOL


def test_quantising_changes_scores_or_the_comparison_would_prove_nothing(kind, members, theirs):
    assert np.abs(scores(lora(members)) - theirs).max() > 0.1


def test_the_flag_beside_weights_that_are_so_already_is_harmless(kind, quantised, members, theirs):
    switch = "load_in_8bit" if "8bit" in kind else "load_in_4bit"
    found = scores(lora(members, pretrained=str(quantised), **{switch: True}))
    np.testing.assert_allclose(found, theirs, atol=ATOL)


def test_other_bits_than_the_folders_are_refused(kind, quantised, members):
    other = "load_in_4bit" if "8bit" in kind else "load_in_8bit"
    with pytest.raises(EnsembleError, match=rf"{other}=True, but .* quantised already.*leave {other} out"):
        lora(members, pretrained=str(quantised), **{other: True})


def test_off_is_off(members):
    plain = lora(members)
    off = lora(members, load_in_4bit=False, load_in_8bit=False, bnb_4bit_use_double_quant=False)
    np.testing.assert_array_equal(scores(off), scores(plain))
    assert identity_of(off) == identity_of(plain)


def test_a_cache_of_dense_scores_is_not_a_quantised_runs(members):
    assert identity_of(lora(members)) != identity_of(lora(members, load_in_4bit=True))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        (
            {"bnb_4bit_quant_type": "nf4"},
            "bnb_4bit_quant_type without load_in_4bit=True .* quantises nothing",
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float17"},
            "bnb_4bit_compute_dtype=float17: .*float17",
        ),
        ({"load_in_4bit": "yes"}, "load_in_4bit=yes: .*must be a boolean"),
    ],
)
def test_arguments_that_cannot_be_followed(members, arguments, said):
    with pytest.raises(EnsembleError, match=said):
        lora(members, **arguments)


def test_without_bitsandbytes_one_line_says_so(members, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else there(name, *a)
    )
    with pytest.raises(
        EnsembleError, match=r"load_in_4bit=True needs bitsandbytes; `pip install bitsandbytes`"
    ):
        lora(members, load_in_4bit=True)


def test_training_and_flags_make_one_configuration():
    asked = quantization.training_arguments("4bit", torch.bfloat16)
    assert asked.keys() <= set(quantization.ARGUMENTS)
    made = quantization.quantization_config(asked).to_dict()
    assert made["bnb_4bit_quant_type"] == "nf4" and made["bnb_4bit_use_double_quant"]
    assert made == quantization.quantization_config(KINDS["nf4"]).to_dict()
    eight = quantization.quantization_config(quantization.training_arguments("8bit", torch.bfloat16))
    assert eight.load_in_8bit and not eight.load_in_4bit


@pytest.mark.parametrize(("bits", "layers"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_training_loads_its_base_by_it(base, bits, layers, monkeypatch):
    options = training._quantization(bits, torch.float32, torch.device("cpu"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == layers
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(EnsembleError, match=rf"quantization={bits} needs bitsandbytes; .* quantization=none"):
        training._quantization(bits, torch.float32, torch.device("cpu"))


def test_a_warning_of_each_product_is_said_once(base, members, caplog):
    """bitsandbytes warns at every product of an 8-bit layer that its input is cast."""
    scores(lora(members, load_in_8bit=True))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("bitsandbytes")]
    assert sum("will be cast" in text for text in said) <= 1


def test_the_quantised_folder_is_found_as_the_same_base(kind, quantised, base, members, tmp_path):
    copied = Path(shutil.copytree(quantised, tmp_path / base.name))
    assert lora(members, pretrained=str(copied)).ensemble.base_model == str(copied)
