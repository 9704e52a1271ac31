"""Wrong numbers are not printed: scores that are none, members that are not whole, tokens that mean another thing."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import random_adapters
from harness_tasks import write_tasks
from lm_eval import simple_evaluate
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager
from test_model import PAIRS, instances, lora

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.scoring.finite import NonFiniteScoreError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def copied(ensemble, tmp_path) -> Path:
    """A copy of the ensemble to break."""
    return Path(shutil.copytree(ensemble, tmp_path / "copied"))


def poison(model, member: int, value: float) -> None:
    """Give one member a weight that is not finite, as an overflow in a half-precision model does."""
    name = model._adapter_names[member]
    for key, parameter in model.model.named_parameters():
        if f".lora_B.{name}." in key:
            parameter.data[0] = value
            return


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", ["packed", "plain"])
def test_a_score_that_is_no_number_names_member_task_and_document(
    ensemble, tmp_path, monkeypatch, value, path
):
    model = lora(ensemble)
    if path == "plain":
        monkeypatch.setattr(
            "lm_eval_lora_ensemble.scoring.choice.PackedModels.choose", lambda *_: "a test asks for it"
        )
    poison(model, 1, value)
    tasks = TaskManager(include_path=str(write_tasks(tmp_path)), include_defaults=False)
    with pytest.raises(
        EnsembleError, match=r"task plain_[ab], document \d+, request \d+: member_01 gives .*(nan|inf).*check"
    ):
        simple_evaluate(model=model, tasks=["both"], task_manager=tasks, bootstrap_iters=0)


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_document_is_that_of_the_request(ensemble, tmp_path, monkeypatch, kind, value):
    """Also between equal requests, and among the several windows of one string."""
    model = lora(ensemble)
    scores = model._scores

    def overflowing(requests, override_bs):
        broken = len(requests) - 1
        for index, score in scores(requests, override_bs):
            members = score.loglikelihoods.copy()
            members[1:] = value if index == broken else members[1:]
            yield index, score._replace(loglikelihoods=members)

    monkeypatch.setattr(model, "_scores", overflowing)
    pairs = PAIRS if kind == "loglikelihood" else [("".join(pair),) for pair in PAIRS]
    cached = CachingLM(model, str(tmp_path / "cache.db"))
    with pytest.raises(NonFiniteScoreError) as caught:
        getattr(cached, kind)(instances(pairs, kind))
    assert f"task test, document {len(PAIRS) - 1}, request 0: member_01 (and 1 more members)" in str(
        caught.value
    )
    assert all(np.isfinite(result[0]) for key, result in cached.dbdict.items() if "owner" not in key)


def test_the_way_out_depends_on_the_dtype(ensemble):
    model = lora(ensemble, dtype="bfloat16")
    poison(model, 2, float("nan"))
    with pytest.raises(EnsembleError, match=r"member_02 gives .* torch.bfloat16; run with dtype=float32"):
        model.loglikelihood(instances(PAIRS[:2]), disable_tqdm=True)


def truncated(folder: Path) -> None:
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])


def other_rank(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    halved = {name: t[:2] if "lora_A" in name else t[:, :2] for name, t in tensors.items()}
    safetensors.torch.save_file({name: t.contiguous() for name, t in halved.items()}, folder / WEIGHTS)


def incomplete(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    del tensors[sorted(tensors)[0]]
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("damage", [truncated, other_rank, incomplete, shutil.rmtree])
@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_member_that_does_not_load_leaves_no_smaller_ensemble(copied, damage, member):
    damaged = f"member_{member:02d}"
    names = [str(copied / f"member_{i:02d}") for i in range(3)]
    damage(copied / damaged)
    with pytest.raises(EnsembleError, match=damaged):
        lora(";".join(names))


def test_the_same_member_twice_is_said_once(copied, caplog):
    shutil.rmtree(copied / "member_02")
    shutil.copytree(copied / "member_00", copied / "member_02")
    with caplog.at_level(logging.WARNING):
        model = lora(copied)
    said = [r.message for r in caplog.records if "same adapter" in r.message]
    assert said == ["member_02 is the same adapter as member_00: it adds nothing but weight to that one"]
    assert model.n_members == 3


@pytest.mark.parametrize(
    ("dtype", "fast", "warned"),
    [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)],
)
def test_emulated_bfloat16_is_warned_of(ensemble, caplog, monkeypatch, dtype, fast, warned):
    monkeypatch.setattr("lm_eval_lora_ensemble.harness.model.has_fast_bfloat16", lambda device: fast)
    lora(ensemble, dtype=dtype)
    said = [r.message for r in caplog.records if "bfloat16" in r.message]
    assert (
        said
        == ["cpu emulates bfloat16, many times slower than float32; add dtype=float32 to --model_args"]
        * warned
    )


def test_the_same_tokenizer_beside_an_adapter_is_fine(copied, llama):
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(copied / "member_01")
    assert lora(copied).n_members == 3


def with_added_token(tokenizer) -> None:
    tokenizer.add_tokens(["<extra>"])


def with_padding_token(tokenizer) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def without_merges(tokenizer) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][:100]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))


def with_tokens_exchanged(tokenizer) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_added_token, r"1 tokens, such as '<extra>', which is 600 there and absent in the base"),
        (with_padding_token, r"1 tokens, such as '\[PAD\]'"),
        (with_tokens_exchanged, r"2 tokens, such as '[AB]', which is \d+ there and \d+ in the base"),
        (without_merges, r"'Question: What is .*' is \[.*\] there and \[.*\] in the base"),
    ],
)
def test_another_tokenizer_is_refused(copied, llama, change, named):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    change(tokenizer)
    tokenizer.save_pretrained(copied / "member_01")
    with pytest.raises(EnsembleError, match=rf"member_01\) differs from the base model's: {named}.*remove"):
        lora(copied)


@pytest.mark.parametrize(("number", "fits"), [("0", True), ("600", False)])
def test_a_tokenizer_configuration_alone_is_compared_by_its_added_tokens(copied, number, fits):
    config = {"added_tokens_decoder": {number: {"content": "<|endoftext|>", "special": True}}}
    (copied / "member_02" / "tokenizer_config.json").write_text(json.dumps(config))
    if fits:
        assert lora(copied).n_members == 3
    else:
        with pytest.raises(EnsembleError, match=r"'<\|endoftext\|>' is 600 there and 0 in the base"):
            lora(copied)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"added_tokens_decoder": {"x": 1}}'])
def test_a_tokenizer_that_cannot_be_read_is_refused(copied, name, content):
    (copied / "member_01" / name).write_bytes(content)
    with pytest.raises(EnsembleError, match=r"member_01.*(cannot be read|not a readable|differs)"):
        lora(copied)


def test_no_code_beside_a_tokenizer_is_run(copied, llama, tmp_path):
    folder, canary = copied / "member_01", tmp_path / "canary"
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.update(
        tokenizer_class="Hostile", auto_map={"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "hostile.py").write_text(f"open({str(canary)!r}, 'w')")
    assert lora(copied).n_members == 3
    assert not canary.exists()


def test_sixty_four_members(llama, tmp_path):
    model = lora(random_adapters(llama, tmp_path, 64))
    scored = model.loglikelihood(instances(PAIRS), disable_tqdm=True)
    assert {value.members.shape for value, _ in scored} == {(64,)}
    assert len({value.members.tobytes() for value, _ in scored[:4]}) == 4
    alone = lora(tmp_path / "member_63").loglikelihood(instances(PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([v.members[63] for v, _ in scored], [float(v) for v, _ in alone], atol=1e-4)
    assert np.unique(scored[0][0].members).size == 64


def test_the_results_say_what_made_them(ensemble, copied):
    recipe = {"learning_rate": 1e-4, "seed": 5, "output": "somewhere"}
    entries = [{"name": f"m{i}", "folder": f"member_{i:02d}", "seed": 5 + i} for i in range(3)]
    book = {"base_model": "b", "revision": None, "members": entries, "recipe": recipe, "schema_version": 1}
    (copied / "ensemble.json").write_text(json.dumps(book))
    model = lora(copied, dtype="bfloat16")
    said = model.get_model_info()["lora_ensemble"]
    assert said["recipe"] == {"learning_rate": 1e-4, "seed": 5}
    assert [member["seed"] for member in said["members"]] == [5, 6, 7]
    assert (said["device"], said["dtype"]) == ("cpu", "bfloat16")
    assert said["versions"]["torch"] == torch.__version__
    assert set(said["versions"]) >= {"lm-eval-lora-ensemble", "lm-eval", "transformers", "peft", "python"}
    assert lora(ensemble).get_model_info()["lora_ensemble"]["recipe"] is None
