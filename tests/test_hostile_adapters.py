"""Adapters from strangers: what is no plain LoRA is refused for its own reason, and nothing of it is run."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import random_adapters, tiny_model
from hostile_adapters import (
    CANARY_MODULE,
    CONFIG,
    FOLDER_CASES,
    LAYER,
    MEMBER_CASES,
    WEIGHTS,
    Case,
    added,
    config,
    manifest,
    pickle_beside,
    tensors,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_lora_ensemble.cli import main
from lm_eval_lora_ensemble.ensemble.adapters.config import _RULES
from lm_eval_lora_ensemble.ensemble.adapters.folder import check_adapter
from lm_eval_lora_ensemble.ensemble.members import find_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError, one_line
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM

pytestmark = pytest.mark.timeout(120)


connections: list[object] = []


def cases(corpus: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("spoil", "reason"), [case[1:] for case in corpus], ids=[case[0] for case in corpus]
    )


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """After every test: no canary has fired, no module of the stranger's is loaded, nothing was connected."""

    def connect(self, address):
        connections.append(address)
        raise OSError(f"the test tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    (tmp_path / f"{CANARY_MODULE}.py").write_text(f"import os; os.mkdir({str(tmp_path / 'canary')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    assert not (tmp_path / "canary").exists()
    assert CANARY_MODULE not in sys.modules
    assert connections == []


@pytest.fixture
def folder(ensemble: Path, tmp_path: Path) -> Path:
    """Two sound members; a case spoils the second."""
    for name in ("member_00", "member_01"):
        shutil.copytree(ensemble / name, tmp_path / "ensemble" / name)
    return tmp_path / "ensemble"


def assert_refused(folder: Path, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Finding, loading and ``lora-ensemble check`` all refuse, in one printable line that gives the reason."""
    for load in (find_ensemble, lambda path: LoraEnsembleLM(adapters=str(path), device="cpu")):
        with pytest.raises(EnsembleError) as caught:
            load(folder)
        assert re.search(reason, str(caught.value))
        assert one_line(caught.value).isprintable()
    capsys.readouterr()
    assert main(["check", str(folder)]) == 2
    captured = capsys.readouterr()
    assert re.search(reason, captured.out + captured.err)
    assert (captured.out + captured.err).replace("\n", "").isprintable()


def test_the_canary_would_fire_and_a_connection_would_be_seen(folder, tmp_path):
    """Without this the checks after every test might prove nothing."""
    pickle_beside(folder / "member_01")
    pickle.loads((folder / "member_01" / "adapter_model.bin").read_bytes())
    (tmp_path / "canary").rmdir()
    importlib.import_module(CANARY_MODULE)
    (tmp_path / "canary").rmdir()
    del sys.modules[CANARY_MODULE]
    with socket.socket() as one, pytest.raises(OSError, match="tried to connect"):
        one.connect(("192.0.2.1", 443))
    connections.clear()


def test_the_folder_that_every_case_spoils_is_sound(folder, capsys):
    assert len(find_ensemble(folder).members) == 2
    assert main(["check", str(folder)]) == 0


@cases(MEMBER_CASES)
def test_a_hostile_member_is_refused(folder, spoil, reason, capsys):
    spoil(folder / "member_01")
    assert_refused(folder, reason, capsys)


@cases(FOLDER_CASES)
def test_a_hostile_folder_is_refused(folder, spoil, reason, capsys):
    spoil(folder)
    assert_refused(folder, reason, capsys)


def test_a_hostile_epoch_is_refused(folder, capsys):
    for name in ("member_00", "member_01"):
        shutil.copytree(folder / name, folder / name / "epoch_01")
    config(auto_map={"AutoModel": f"{CANARY_MODULE}.Canary"})(folder / "member_01" / "epoch_01")
    assert len(find_ensemble(folder).members) == 2
    with pytest.raises(EnsembleError, match=r"member_01/epoch_01/.* may name no code"):
        find_ensemble(folder, epoch=1)
    manifest(epochs={"1": "member_01/epoch_01"})(folder)
    assert main(["check", str(folder)]) == 2
    assert "may name no code" in capsys.readouterr().out


def test_check_still_says_what_is_sound(folder, capsys):
    config(r=10**9)(folder / "member_00")
    assert main(["check", str(folder)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("member_00: BROKEN") and lines[1].startswith("member_01: ok")
    assert lines[2] == "1 of 2 members are BROKEN"


def test_a_pickle_beside_is_never_read(folder):
    pickle_beside(folder / "member_01")
    assert main(["check", str(folder)]) == 0
    assert LoraEnsembleLM(adapters=str(folder), device="cpu").n_members == 2


@pytest.mark.parametrize(
    "name",
    ["./member", "../member", "/member", "~/member", r"org\member", "ensemble/member", "a/b/c", "org/.."],
)
def test_a_name_that_looks_like_a_path_is_never_asked_of_the_hub(folder, monkeypatch, name):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(EnsembleError, match="no adapter folder"):
        find_ensemble(name)


@pytest.mark.parametrize("base", ["./base", "../base", "/no/base", "~/base", r"org\base", "ensemble/base"])
def test_a_base_that_looks_like_a_path_is_never_asked_of_the_hub(folder, monkeypatch, base):
    monkeypatch.chdir(folder.parent)
    for name in ("member_00", "member_01"):
        config(base_model_name_or_path=base)(folder / name)
    with pytest.raises(EnsembleError, match="no base model folder"):
        LoraEnsembleLM(adapters=str(folder), device="cpu")


# -------------------------------------------------------------------------------------- against the base model


def resized(name: str, *shape: int):
    return tensors(lambda values: values.update({name: np.ones(shape, np.float32)}))


def half_of_the_layers(member: Path) -> None:
    tensors(lambda values: [values.pop(name) for name in list(values) if ".layers.2." in name])(member)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (resized(f"{LAYER}.lora_A.weight", 4, 47), r"A of .*q_proj has shape \(4, 47\).* needs \(4, 48\)"),
        (resized(f"{LAYER}.lora_B.weight", 96, 4), r"B of .*q_proj has shape \(96, 4\).* needs \(48, 4\)"),
        (
            tensors(lambda v: [v.update({n.replace(".0.", ".9."): v.pop(n)}) for n in list(v) if ".0." in n]),
            r"layers.9.*, which the base model .*tiny-llama does not have",
        ),
        (half_of_the_layers, r"lacks the weights of model.layers.2.*\(2 such layers\)"),
        (config(exclude_modules=["v_proj"]), "has weights, which PEFT does not load, of .*v_proj"),
        (added("base_model.model.lm_head.weight", 600, 48), "brings its own lm_head.weight"),
        (added("base_model.model.lm_head.weight", 599, 48), r"lm_head.weight has shape \(599, 48\)"),
    ],
    ids=[
        "in",
        "out",
        "no such layer",
        "layers missing",
        "layers dropped",
        "own head",
        "head of another size",
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused(folder, spoil, reason):
    spoil(folder / "member_01")
    with pytest.raises(EnsembleError, match=reason):
        LoraEnsembleLM(adapters=str(folder), device="cpu")


def test_the_adapter_of_another_base_is_refused(folder, tmp_path):
    other = tiny_model(tmp_path / "tiny-llama", "llama", hidden_size=32)
    with pytest.raises(EnsembleError, match=r"has shape \(4, 48\), the base model .* needs \(4, 32\)"):
        LoraEnsembleLM(pretrained=str(other), adapters=str(folder), device="cpu")


def test_a_base_that_is_code_is_not_run(folder, llama, tmp_path, edit_json):
    base = Path(shutil.copytree(llama, tmp_path / "tiny-llama"))
    edit_json(base / "config.json", model_type="stranger", auto_map={"AutoConfig": f"{CANARY_MODULE}.C"})
    shutil.copy(tmp_path / f"{CANARY_MODULE}.py", base)
    with pytest.raises(ValueError, match="trust_remote_code"):
        LoraEnsembleLM(pretrained=str(base), adapters=str(folder), device="cpu")


# ------------------------------------------------------------------------------------------ genuine adapters

KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "dora on embeddings": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "regular expression": {"target_modules": r".*\.layers\.[01]\.self_attn\.(q|v)_proj"},
    "layers_to_transform": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 2.5}},
    "lora_bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "modules_to_save": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "trained tokens": {"trainable_token_indices": [1, 5]},
}


REQUEST = Instance("loglikelihood", {}, ("The members of an ensemble", " are adapters"), 0)


def loglikelihoods(adapters: Path) -> np.ndarray:
    model = LoraEnsembleLM(adapters=str(adapters), device="cpu")
    ((value, _),) = model.loglikelihood([REQUEST], disable_tqdm=True)
    return value.members


def train_the_rest(member: Path, seed: int) -> None:
    """Change what was saved besides LoRA matrices and the base model's own embeddings."""
    generator = np.random.default_rng(seed)

    def change(values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            if ".lora_" not in name and ".base_layer." not in name:
                value[:] += generator.normal(0, 0.1, value.shape).astype(np.float32)

    tensors(change)(member)


@pytest.mark.parametrize("kind", KINDS)
def test_every_genuine_kind_scores_as_hf_with_each_adapter(llama, tmp_path, kind, capsys):
    adapters = random_adapters(llama, tmp_path / "ensemble", 2, spread=0.1, **KINDS[kind])
    members = sorted(adapters.iterdir())
    for seed, member in enumerate(members):
        train_the_rest(member, seed)
    assert main(["check", str(adapters)]) == 0
    theirs = []
    for member in members:
        hf = HFLM(pretrained=str(llama), peft=str(member), device="cpu")
        theirs.append(hf.loglikelihood([REQUEST], disable_tqdm=True)[0][0])
    assert theirs[0] != theirs[1]
    np.testing.assert_allclose(loglikelihoods(adapters), theirs, atol=1e-4)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["adapted", "saved", "embeddings"],
)
def test_a_head_that_is_tied_to_the_embeddings_scores_as_peft_itself(tmp_path, lora):
    """``hf`` ends in a KeyError when it ties the weights of a wrapped head, so PEFT alone is the reference."""
    base = tiny_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    adapters = random_adapters(base, tmp_path / "ensemble", 2, spread=0.1, **lora)
    for seed, member in enumerate(sorted(adapters.iterdir())):
        train_the_rest(member, seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    context, whole = (tokenizer(text)["input_ids"] for text in (REQUEST.args[0], "".join(REQUEST.args)))
    expected = []
    for member in sorted(adapters.iterdir()):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), member).eval()
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        following = range(len(context), len(whole))
        expected.append(sum(float(logits[at - 1, whole[at]]) for at in following))
    assert expected[0] != expected[1]
    np.testing.assert_allclose(loglikelihoods(adapters), expected, atol=1e-4)


def test_embeddings_that_all_members_share_are_accepted(folder):
    """What PEFT saves after a resize of the vocabulary; loading it for one member is loading it for all."""
    for name in ("member_00", "member_01"):
        added("base_model.model.lm_head.weight", 600, 48)(folder / name)
    assert np.isfinite(loglikelihoods(folder)).all()


def test_adapters_saved_without_a_task_type_are_accepted(llama, tmp_path):
    """PEFT then writes transformers' own class into ``auto_mapping``; nothing imports it."""
    adapters = random_adapters(llama, tmp_path / "ensemble", 1)
    mapping = {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    before = loglikelihoods(adapters)
    config(task_type=None, auto_mapping=mapping)(adapters / "member_00")
    np.testing.assert_array_equal(loglikelihoods(adapters), before)


def test_options_of_later_releases_are_accepted_while_switched_off(folder):
    config(later_variant=None, use_later=False, later_config={}, merge_weights=False)(folder / "member_01")
    assert len(find_ensemble(folder).members) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_saved_in_other_types_are_accepted(folder, dtype):
    for name in ("member_00", "member_01"):
        path = folder / name / WEIGHTS
        save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    assert np.isfinite(loglikelihoods(folder)).all()


def test_links_inside_the_ensemble_are_followed(folder):
    (folder / "member_00" / WEIGHTS).rename(folder / ".weights")
    (folder / "member_00" / WEIGHTS).symlink_to("../.weights")
    assert len(find_ensemble(folder).members) == 2


def test_an_adapter_from_the_hubs_cache_is_accepted(ensemble, tmp_path, monkeypatch):
    """The cache's own layout: links from the snapshot into the repository's blobs, named by their hashes."""
    repository = tmp_path / "hub" / "models--org--adapter"
    snapshot = repository / "snapshots" / ("0" * 40)
    for part in (repository / "blobs", repository / "refs", snapshot):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for name in (CONFIG, WEIGHTS):
        shutil.copy(ensemble / "member_00" / name, repository / "blobs" / name[::-1])
        (snapshot / name).symlink_to(f"../../blobs/{name[::-1]}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_ensemble("org/adapter").members[0].folder == snapshot
    assert main(["check", str(snapshot)]) == 0
    (snapshot / WEIGHTS).unlink()
    with pytest.raises(
        EnsembleError, match=r"org/adapter has no .* `hf download org/adapter --local-dir FOLDER`"
    ):
        find_ensemble("org/adapter")
    (snapshot / WEIGHTS).symlink_to(ensemble / "member_00" / WEIGHTS)
    with pytest.raises(EnsembleError, match="lies outside"):
        find_ensemble("org/adapter")


# ------------------------------------------------------------------------------------------------- everything

FUZZ = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def damaged(data: bytes, flips: list[tuple[float, int]], keep: float) -> bytes:
    """Change bits at the given places, as parts of the length, and cut the end off."""
    changed = bytearray(data)
    for place, mask in flips:
        changed[min(int(place * len(data)), len(data) - 1)] ^= mask
    return bytes(changed[: int(keep * len(data))])


places = st.floats(0, 1)
flips = st.lists(st.tuples(places, st.integers(1, 255)), max_size=8)


@FUZZ
@given(name=st.sampled_from([CONFIG, WEIGHTS]), flips=flips, keep=st.one_of(st.just(1.0), places))
def test_damage_is_refused_or_harmless(folder, ensemble, name, flips, keep):
    """A damaged file raises :class:`EnsembleError` or is still a sound adapter; nothing else is raised."""
    original = (ensemble / "member_00" / name).read_bytes()
    (folder / "member_00" / name).write_bytes(damaged(original, flips, keep))
    try:
        check_adapter(folder / "member_00", folder)
    except EnsembleError as error:
        assert one_line(error).isprintable()
    finally:
        (folder / "member_00" / name).write_bytes(original)


@FUZZ
@given(data=st.data())
def test_damage_to_the_header_is_refused_or_harmless(folder, ensemble, data):
    """The same aimed at the weights' header, a small part of the file."""
    original = (ensemble / "member_00" / WEIGHTS).read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")
    changed = damaged(original[:length], data.draw(flips), 1.0) + original[length:]
    (folder / "member_00" / WEIGHTS).write_bytes(changed)
    try:
        check_adapter(folder / "member_00", folder)
    except EnsembleError as error:
        assert one_line(error).isprintable()


@FUZZ
@given(flips=flips, keep=st.one_of(st.just(1.0), places))
def test_damage_to_the_manifest_is_refused_or_harmless(folder, flips, keep):
    manifest(epochs={"1": "member_00"}, files={f"member_01/{CONFIG}": "0" * 64}, seed=3)(folder)
    path = folder / "ensemble.json"
    path.write_bytes(damaged(path.read_bytes(), flips, keep))
    try:
        find_ensemble(folder)
    except EnsembleError as error:
        assert one_line(error).isprintable()
    assert main(["check", str(folder)]) in (0, 2)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
keys = sorted(peft.LoraConfig().to_dict())


@FUZZ
@example(key="target_modules", value="(((")
@example(key="rank_pattern", value={"[": 4})
@given(key=st.sampled_from(keys), value=json_values)
def test_any_value_of_any_key_is_refused_or_harmless(folder, key, value):
    path = folder / "member_00" / CONFIG
    original = path.read_text()
    config(**{key: value})(folder / "member_00")
    try:
        check_adapter(folder / "member_00", folder)
    except EnsembleError as error:
        assert one_line(error).isprintable()
    finally:
        path.write_text(original)


def test_every_option_of_the_installed_peft_is_known():
    """Whatever PEFT writes by default is accepted: a release that renames an option fails here first."""
    assert set(peft.LoraConfig().to_dict()) <= set(_RULES)


def test_ten_megabytes_are_checked_in_a_moment(tmp_path):
    """Rank 64 on 24 layers of width 832: reading every value must not be felt."""
    matrices = {}
    for layer in range(24):
        name = f"base_model.model.model.layers.{layer}.q_proj"
        matrices[f"{name}.lora_A.weight"] = torch.ones(64, 832)
        matrices[f"{name}.lora_B.weight"] = torch.ones(832, 64)
    save_file(matrices, tmp_path / WEIGHTS)
    values = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 64, "target_modules": ["q_proj"]}
    (tmp_path / CONFIG).write_text(json.dumps(values))
    assert (tmp_path / WEIGHTS).stat().st_size > 10_000_000
    start = time.process_time()
    assert check_adapter(tmp_path, tmp_path).weights.n_parameters == 24 * 2 * 64 * 832
    assert time.process_time() - start < 1.0
