"""A task's documents under one adapter: what is scored, what is put back, what may not be fitted to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from posterior_task_fixtures import data_of, make_place, source_of, write_adapter
from train_fixtures import documents, one_thread, quick_tasks  # noqa: F401

from lm_eval_lora_ensemble import load_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.data import TaskData
from lm_eval_lora_ensemble.train.scale import ChoiceScale


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("posterior-data"))


@pytest.fixture
def source(place):
    return source_of(place / "adapters" / "member_00")


def test_another_adapter_in_the_source_s_place_scores_as_it_does_loaded_alone(place, source, tmp_path):
    data = data_of(place, source)
    sample = data.sample(6)
    other = source_of(place / "adapters" / "member_01").adapters[0]
    before = data.loglikelihoods(sample)
    swapped = data.loglikelihoods(sample, other.state)
    after = data.loglikelihoods(sample)
    folder = write_adapter(tmp_path / "other", source, other.state)
    loaded = load_ensemble(None, folder, dtype="float32", device="cpu", batch_size=8)
    pairs = [pair for document in sample.rendered for pair in document.requests]
    alone = loaded.loglikelihoods(*map(list, zip(*pairs, strict=True)))[0]
    assert swapped[np.isfinite(swapped)] == pytest.approx(alone, abs=1e-5)
    there = np.isfinite(before)
    assert np.abs(swapped[there] - before[there]).max() > 0.1
    assert np.array_equal(before, after)


def test_the_source_s_tensors_come_back_after_an_error(place, source, monkeypatch):
    data = data_of(place, source)
    sample = data.sample(3)
    before = data.loglikelihoods(sample)
    broken = {name: tensor * torch.nan for name, tensor in source.adapters[0].state.items()}
    with pytest.raises(EnsembleError, match="nan"):
        data.loglikelihoods(sample, broken)
    assert np.array_equal(before, data.loglikelihoods(sample))
    with pytest.raises(EnsembleError, match=r"differs from member_00 in .*lora_A\.weight"):
        data.loglikelihoods(sample, dict(list(source.adapters[0].state.items())[1:]))


@pytest.mark.parametrize("scale", [ChoiceScale(), ChoiceScale("chars", 0.3)])
@pytest.mark.parametrize("per_pass", [1, 4])
def test_the_differentiable_scores_are_the_engine_s(place, source, scale, per_pass):
    data = data_of(place, source)
    sample = data.sample(6)
    wanted = data.loglikelihoods(sample) / data.divisors(sample, scale)
    parts = [part.detach().numpy() for part in data.differentiable(sample, scale, per_pass)]
    assert [len(part) for part in parts] == ([1] * 6 if per_pass == 1 else [4, 2])
    found = [score for part in parts for row in part for score in row[np.isfinite(row)]]
    assert found == pytest.approx(wanted[np.isfinite(wanted)], abs=1e-4)


def test_a_base_in_bfloat16_has_float32_leaves(place, source):
    data = TaskData(
        source,
        "colours",
        model_args={"dtype": "bfloat16", "device": "cpu", "batch_size": 8},
        include_path=str(place / "tasks"),
    )
    sample = data.sample(2)
    wanted = data.loglikelihoods(sample)
    weight = data.model.base_model.model.model.layers[1].self_attn.q_proj.lora_A[data.adapter_name].weight
    weight.requires_grad_(True)
    found = next(data.differentiable(sample, ChoiceScale(), per_pass=2))
    assert found.dtype == weight.dtype == torch.float32
    there = np.isfinite(wanted)
    assert found.detach().numpy()[there] == pytest.approx(wanted[there], rel=0.02)
    (gradient,) = torch.autograd.grad(found[0, 0], weight)
    assert float(gradient.abs().max()) > 0


def test_their_gradient_is_that_of_the_scores(place, source):
    data = data_of(place, source)
    sample = data.sample(1)
    adapted = data.model.base_model.model.model.layers[0].self_attn.v_proj
    weight = adapted.lora_B[data.adapter_name].weight.requires_grad_(True)
    scores = next(data.differentiable(sample, ChoiceScale()))
    (gradient,) = torch.autograd.grad(scores[0, 1], weight)
    name = next(n for n in source.adapters[0].state if "layers.0.self_attn.v_proj.lora_B" in n)
    step = 1e-3 * gradient / gradient.norm()
    values = [
        data.loglikelihoods(
            sample, {**source.adapters[0].state, name: source.adapters[0].state[name] + sign * step}
        )
        for sign in (1, -1)
    ]
    difference = (values[0] - values[1])[0, 1] / 2e-3
    assert difference == pytest.approx(float(gradient.norm()), rel=1e-2)


def test_samples_cover_the_split_and_lie_apart(place, source):
    data = data_of(place, source)
    assert data.total == 44
    sample = data.sample(11)
    assert [document.doc_id for document in sample.rendered] == list(range(0, 44, 4))
    assert sample.as_mapping() == {"split": "training", "tasks": {"colours": list(range(0, 44, 4))}}
    others = data.sample(40, apart_from=sample)
    assert sorted(d.doc_id for d in (*sample.rendered, *others.rendered)) == list(range(44))
    assert data.has_validation
    assert len(data.sample(99, split="validation", apart_from=sample)) == 12
    golds = [doc["gold"] for doc in documents(44)]
    assert sample.is_gold.argmax(1).tolist() == golds[::4]
    with pytest.raises(EnsembleError, match="only the 44 documents that are in use"):
        data.sample(1, apart_from=data.sample(44))


def test_several_tasks_share_a_sample(place, source):
    data = data_of(place, source, "colours,letters", limit=10)
    assert data.total == 20
    assert {name: len(ids) for name, ids in data.sample(6).as_mapping()["tasks"].items()} == {
        "colours": 3,
        "letters": 3,
    }


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("colours", {"split": "test"}, "split=test: a posterior is fitted to training or validation"),
        ("judged_on_validation", {"split": "validation"}, "is evaluated on its validation split"),
        ("generating", {}, "is generate_until"),
        ("colours", {"limit": 0}, "limit=0"),
        ("nothing", {}, "lm-eval knows no task 'nothing'"),
    ],
)
def test_what_may_not_be_fitted_to_is_refused(place, source, task, options, message):
    with pytest.raises(EnsembleError, match=message):
        data_of(place, source, task, **options)


def test_a_task_judged_on_validation_offers_no_validation_documents(place, source):
    assert not data_of(place, source, "judged_on_validation").has_validation


def test_several_adapters_are_refused(place):
    both = source_of(place / "adapters" / "member_00", place / "adapters" / "member_01")
    with pytest.raises(EnsembleError, match="the source has 2; choose one with member=K"):
        data_of(place, both)
