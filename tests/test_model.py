"""The backend against lm-eval's own ``hf``, one adapter at a time."""

from __future__ import annotations

import copy
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_adapters
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from sqlitedict import SqliteDict

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.cache import OWNER_KEY
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.scoring.loglikelihood import EnsembleLoglikelihood

PAIRS = [
    ("The members of an ensemble", " are adapters"),
    ("The members of an ensemble", " are folders of files"),
    ("The members of an ensemble", " are"),
    ("", " nothing before"),
    ("trailing space ", "then a word"),
    ("a much longer context " * 20, " and a long continuation that goes on and on for a while"),
    ("over the limit " * 120, " truncated from the left"),
    ("The members of an ensemble", " are adapters"),
]


def instances(pairs: list[tuple[str, ...]], kind: str = "loglikelihood") -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=0, metadata=("test", i, 1))
        for i, pair in enumerate(pairs)
    ]


def hf(base: Path, adapter: Path | None = None, **kwargs: object) -> HFLM:
    return HFLM(pretrained=str(base), peft=str(adapter) if adapter else None, device="cpu", **kwargs)


def lora(adapters: Path, **kwargs: object) -> LoraEnsembleLM:
    return LoraEnsembleLM(adapters=str(adapters), device="cpu", **kwargs)


def test_each_member_scores_what_hf_with_that_adapter_scores(llama, ensemble):
    ours = lora(ensemble, batch_size=3).loglikelihood(instances(PAIRS), disable_tqdm=True)
    for i in range(3):
        theirs = hf(llama, ensemble / f"member_{i:02d}", batch_size=3).loglikelihood(
            instances(PAIRS), disable_tqdm=True
        )
        np.testing.assert_allclose([v.members[i] for v, _ in ours], [v for v, _ in theirs], atol=1e-4)
    expected = [np.log(np.mean(np.exp(v.members - v.members.max()))) + v.members.max() for v, _ in ours]
    np.testing.assert_allclose([v for v, _ in ours], expected, rtol=1e-12)


def test_adapters_differ_or_the_comparison_above_would_prove_nothing(ensemble):
    (value, _), *_ = lora(ensemble).loglikelihood(instances(PAIRS[:1]), disable_tqdm=True)
    assert value.members.std() > 0.01


@pytest.mark.parametrize("copies", [1, 3])
def test_equal_members_are_the_single_model(llama, ensemble, copies):
    same = [str(ensemble / "member_00")] * copies
    ours = LoraEnsembleLM(adapters=same, device="cpu").loglikelihood(instances(PAIRS), disable_tqdm=True)
    theirs = hf(llama, ensemble / "member_00").loglikelihood(instances(PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], atol=1e-4)
    assert [g for _, g in ours] == [g for _, g in theirs]


def test_epoch_0_is_the_base_model(llama, ensemble):
    ours = lora(ensemble, epoch=0).loglikelihood(instances(PAIRS), disable_tqdm=True)
    theirs = hf(llama).loglikelihood(instances(PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], atol=1e-4)
    assert all(v.members.shape == (1,) for v, _ in ours)


def test_greedy_is_the_mixtures_choice_not_the_members(ensemble):
    """Written out against the definition: chain rule on the mixture over whole continuations."""
    model = lora(ensemble)
    context = model.tok_encode("The members of an ensemble")
    greedy: list[int] = []
    for _ in range(4):
        joint = 0.0
        for member in range(3):
            model._activate(member)
            with torch.no_grad():
                logits = model.model(torch.tensor([context + greedy])).logits[0].log_softmax(-1)
            past = sum(logits[len(context) - 1 + i, t] for i, t in enumerate(greedy))
            joint = joint + torch.exp(past + logits[-1])
        greedy.append(int(joint.argmax()))
    wrong = [*greedy[:-1], (greedy[-1] + 1) % 600]
    (_, right), (_, changed) = model._loglikelihood_tokens(
        [(None, context, greedy), (None, context, wrong)], disable_tqdm=True
    )
    assert right and not changed


def test_rolling_averages_members_over_the_whole_string(llama, ensemble):
    text = "A text that is longer than the window of the tiny model. " * 20
    model = lora(ensemble, max_length=64, batch_size=4)
    (ours,) = model.loglikelihood_rolling(instances([(text,)], "loglikelihood_rolling"), disable_tqdm=True)
    for i in range(3):
        single = hf(llama, ensemble / f"member_{i:02d}", max_length=64, batch_size=4)
        (theirs,) = single.loglikelihood_rolling(instances([(text,)], "loglikelihood_rolling"))
        assert ours.members[i] == pytest.approx(theirs, abs=1e-3)
    assert float(ours) == float(EnsembleLoglikelihood.average(ours.members))


def test_average_loglikelihood_is_the_arithmetic_mean(ensemble):
    values = lora(ensemble, average="loglikelihood").loglikelihood(instances(PAIRS), disable_tqdm=True)
    assert all(float(v) == pytest.approx(v.members.mean()) for v, _ in values)


def test_members_takes_the_first_k(ensemble):
    two = lora(ensemble, members=2).loglikelihood(instances(PAIRS[:1]), disable_tqdm=True)[0][0]
    three = lora(ensemble).loglikelihood(instances(PAIRS[:1]), disable_tqdm=True)[0][0]
    np.testing.assert_allclose(two.members, three.members[:2], atol=1e-5)


def test_model_info_identifies_the_ensemble(ensemble, llama, tmp_path):
    info = lora(ensemble).get_model_info()["lora_ensemble"]
    assert [member["name"] for member in info["members"]] == ["member_00", "member_01", "member_02"]
    assert len(info["fingerprint"]) == 64
    other = lora(random_adapters(llama, tmp_path, 3, spread=0.31)).get_model_info()["lora_ensemble"]
    assert other["fingerprint"] != info["fingerprint"]
    assert lora(ensemble, members=2).get_model_info()["lora_ensemble"]["fingerprint"] != info["fingerprint"]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_members_survive_copies_and_the_cache(duplicate):
    value = EnsembleLoglikelihood.average([-1.0, -2.5, -0.25])
    again = duplicate(value)
    assert again == value and np.array_equal(again.members, value.members)
    assert repr(again) == repr(float(value))
    with pytest.raises(ValueError, match="read-only"):
        again.members[0] = 0.0


def test_log_mean_exp_of_impossible_continuations():
    assert float(EnsembleLoglikelihood.average([-np.inf, -np.inf])) == -np.inf
    assert float(EnsembleLoglikelihood.average([-np.inf, 0.0])) == pytest.approx(-np.log(2))
    assert np.isnan(EnsembleLoglikelihood.average([np.nan, 0.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"average": "mean"}, "average=mean: use one of"),
        ({"members": -1}, "members=-1: give a whole number"),
        ({"epoch": 1.5}, "epoch=1.5: give a whole number"),
        ({"peft": "x"}, "name adapters with adapters="),
        ({"allow_base_mismatch": "no"}, "allow_base_mismatch=no: give True or False"),
        ({"uncertainty_metrics": "no"}, "uncertainty_metrics=no: give True or False"),
        ({"batch_size": 0}, "batch_size=0: give a whole number above 0, or auto"),
        ({"batch_size": "some"}, "batch_size=some: give a whole number above 0, or auto"),
        ({"device": "gpu"}, "device=gpu: torch has no such device"),
        ({"member": 1}, "there is no argument member; did you mean members"),
    ],
)
def test_wrong_arguments_are_refused(ensemble, arguments, message):
    with pytest.raises(EnsembleError, match=message):
        LoraEnsembleLM(adapters=str(ensemble), **{"device": "cpu", **arguments})


@pytest.mark.parametrize("batch_size", ["auto", "auto:4", "2", 3])
def test_batch_sizes_of_lm_eval_are_taken(ensemble, batch_size):
    assert lora(ensemble, batch_size=batch_size, attn_implementation="eager").n_members == 3


def test_threads_take_turns(ensemble):
    """Which adapter is active is a state of the model, and which segments attend one of the process."""
    model = lora(ensemble)
    alone = [v.members for v, _ in model.loglikelihood(instances(PAIRS), disable_tqdm=True)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(
                pool.map(lambda _: model.loglikelihood(instances(PAIRS), disable_tqdm=True), range(12))
            )
    finally:
        sys.setswitchinterval(before)
    for result in found:
        np.testing.assert_allclose([v.members for v, _ in result], alone, atol=1e-6)


def caching(model, path: Path) -> CachingLM:
    return CachingLM(model, str(path))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"members": 2}, "members differ"),
        ({"epoch": 0}, "epoch and members differ: None there, 0 now"),
        ({"average": "loglikelihood"}, "average differ: probability there, loglikelihood now"),
        ({"revision": "other"}, "revision differ: main there, other now"),
        ({"dtype": "bfloat16"}, "dtype differ: torch.float32 there, torch.bfloat16 now"),
    ],
)
def test_a_cache_belongs_to_one_ensemble(ensemble, tmp_path, other, named):
    first = caching(lora(ensemble), tmp_path / "cache.db")
    before = first.loglikelihood(instances(PAIRS))
    contents = dict(first.dbdict)
    first.dbdict.close()
    with pytest.raises(EnsembleError, match=named):
        caching(lora(ensemble, **other), tmp_path / "cache.db")
    again = caching(lora(ensemble), tmp_path / "cache.db")
    assert set(again.dbdict) == set(contents)
    after = again.loglikelihood(instances(PAIRS))
    assert [v for v, _ in after] == [v for v, _ in before]
    assert all(np.array_equal(a.members, b.members) for (a, _), (b, _) in zip(after, before, strict=True))


def test_a_cache_belongs_to_one_base_model(ensemble, llama, tmp_path):
    caching(lora(ensemble), tmp_path / "cache.db").dbdict.close()
    other = shutil.copytree(llama, tmp_path / "other-base")
    with pytest.raises(EnsembleError, match=f"base model differ: {llama} there, {other} now"):
        caching(lora(ensemble, pretrained=str(other), allow_base_mismatch=True), tmp_path / "cache.db")


def test_a_cache_belongs_to_the_base_models_weights(ensemble, llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    known = {"pretrained": str(base), "allow_base_mismatch": True}
    first = caching(lora(ensemble, **known), tmp_path / "cache.db")
    older = {name: value for name, value in first.dbdict[OWNER_KEY].items() if name != "base weights"}
    first.dbdict.close()
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: 0.9 * tensor for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(EnsembleError, match="base weights differ"):
        caching(lora(ensemble, **known), tmp_path / "cache.db")
    with SqliteDict(str(tmp_path / "cache.db"), autocommit=True) as cache:
        cache[OWNER_KEY] = older  # an earlier release did not know them
    caching(lora(ensemble, **known), tmp_path / "cache.db").dbdict.close()


def test_a_cache_knows_how_its_requests_were_encoded(ensemble, tmp_path):
    caching(lora(ensemble), tmp_path / "cache.db").dbdict.close()
    with pytest.raises(EnsembleError, match="add_bos_token differ: None there, True now"):
        caching(lora(ensemble, add_bos_token=True), tmp_path / "cache.db")
    caching(lora(ensemble, add_bos_token=True), tmp_path / "bos.db").dbdict.close()
    with pytest.raises(EnsembleError, match="add_bos_token differ: True there, None now"):
        caching(lora(ensemble), tmp_path / "bos.db")


def test_a_cache_of_another_model_is_refused(llama, ensemble, tmp_path):
    theirs = caching(hf(llama), tmp_path / "cache.db")
    theirs.loglikelihood(instances(PAIRS[:2]))
    theirs.dbdict.close()
    with pytest.raises(EnsembleError, match="scores of another model"):
        caching(lora(ensemble), tmp_path / "cache.db")
