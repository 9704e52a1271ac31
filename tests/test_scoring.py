"""The packed path against the plain one: same numbers, whatever the shape of the requests."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import disk_offload
from conftest import random_adapters, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM

from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.scoring.attention import SegmentAttention
from lm_eval_lora_ensemble.scoring.forward import PackedModel
from lm_eval_lora_ensemble.scoring.packed import PackedScorer, Work
from lm_eval_lora_ensemble.scoring.passes import Passes, all_passes
from lm_eval_lora_ensemble.scoring.plain import score_plain
from lm_eval_lora_ensemble.scoring.tuning import Tuning
from lm_eval_lora_ensemble.tree.requests import TokenRequest, truncate
from lm_eval_lora_ensemble.tree.rows import lay_out
from lm_eval_lora_ensemble.tree.segments import Sizes
from lm_eval_lora_ensemble.tree.trie import PrefixTrie, common_prefix

SMALL = Tuning(tokens=64, masked_tokens=64, logits=4096, sizes=Sizes(square=4, whole=6, block=3, carried=2))

tokens = st.integers(0, 5)  # few distinct tokens: many shared prefixes
sequence = st.lists(tokens, min_size=2, max_size=24)


@st.composite
def request_lists(draw: st.DrawFn) -> list[TokenRequest]:
    """Requests that extend one another, repeat, nest, and end anywhere."""
    stems = draw(st.lists(sequence, min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(1, 8))):
        whole = draw(st.sampled_from(stems)) + draw(st.lists(tokens, max_size=8))
        n_targets = draw(st.integers(1, len(whole) - 1))
        found.append(truncate(whole[:-n_targets], whole[-n_targets:], draw(st.integers(n_targets, 40))))
    return found


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request, tmp_path_factory) -> LoraEnsembleLM:
    base = request.getfixturevalue(request.param)
    adapters = random_adapters(base, tmp_path_factory.mktemp("members"), 3)
    return LoraEnsembleLM(adapters=str(adapters), device="cpu")


def plain(model: LoraEnsembleLM, requests: list[TokenRequest]) -> dict:
    with torch.inference_mode():
        return dict(
            score_plain(
                requests,
                model._forward_plain,
                n_members=model.n_members,
                batch_size=4,
                device=model.device,
            )
        )


def packed_model(model: LoraEnsembleLM, tuning: Tuning = SMALL, attention: str = "segments") -> PackedModel:
    chosen = model._packed_models.choose(2)
    assert isinstance(chosen, PackedModel), chosen
    return PackedModel(model.model, tuning, chosen.shared_layers, attention)


def packed(
    model: LoraEnsembleLM,
    requests: list[TokenRequest],
    budget: int = 64,
    tuning: Tuning = SMALL,
    attention: str = "segments",
) -> dict:
    scorer = PackedScorer(
        packed_model(model, tuning, attention),
        model._activate,
        n_members=model.n_members,
        token_budget=budget,
    )
    with torch.inference_mode():
        found = list(scorer.score(requests))
    assert len(found) == len({index for index, _ in found})
    return dict(found)


def assert_same(one: dict, other: dict) -> None:
    assert sorted(one) == sorted(other)
    for index, score in one.items():
        np.testing.assert_allclose(score.loglikelihoods, other[index].loglikelihoods, atol=1e-4)
        assert score.is_greedy == other[index].is_greedy


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=request_lists(),
    budget=st.sampled_from([1, 16, 200]),
    sizes=st.builds(Sizes, *[st.integers(1, 12)] * 4),
    attention=st.sampled_from(["segments", "masked"]),
)
def test_random_tries_score_as_the_plain_path(model, requests, budget, sizes, attention):
    tuning = dataclasses.replace(SMALL, sizes=sizes)
    assert_same(packed(model, requests, budget, tuning, attention), plain(model, requests))


@settings(max_examples=100, deadline=None)
@given(requests=request_lists(), budget=st.sampled_from([1, 12, 60]))
def test_every_sequence_is_in_exactly_one_pass(requests, budget):
    trie = PrefixTrie(requests)
    passes = Passes(trie, requests)
    seen, computed = [], 0
    for one in all_passes(passes, budget):
        row = lay_out(trie, one.start, one.stop)
        computed += passes.size(one)
        assert len(row) == one.prefix + passes.size(one)
        assert passes.size(one) <= max(budget, *trie.lengths) or one.stop == one.start + 1
        # what is kept is a prefix of the sequence before, and holds no position that is asked for
        assert one.prefix <= trie.shared[one.start]
        for i, path in row.paths.items():
            seen.append(i)
            assert tuple(row.tokens[path]) == trie.sequences[i]
            assert row.positions[path].tolist() == list(range(trie.lengths[i]))
            for index in trie.requests_of[i]:
                assert path[len(path) - len(requests[index].targets)] >= one.prefix
    assert seen == list(range(len(trie.sequences)))
    assert computed >= trie.n_positions


@given(requests=request_lists())
def test_one_pass_computes_each_position_once(requests):
    trie = PrefixTrie(requests)
    passes = Passes(trie, requests)
    assert [passes.size(one) for one in all_passes(passes, 10**6)] == [trie.n_positions]


@given(requests=request_lists())
def test_the_trie_counts_distinct_positions(requests):
    prefixes = {request.tokens[:k] for request in requests for k in range(1, len(request.tokens) + 1)}
    assert PrefixTrie(requests).n_positions == len(prefixes)


@given(sequence, sequence)
def test_common_prefix(one, other):
    length = common_prefix(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


def few_shot_requests(n: int = 12) -> list[TokenRequest]:
    """A long shared prefix, then documents with four choices each."""
    draw = np.random.default_rng(3)
    stem = draw.integers(0, 600, 90).tolist()
    found = []
    for _ in range(n):
        question = draw.integers(0, 600, 14).tolist()
        found += [truncate(stem + question, draw.integers(0, 600, k).tolist(), 256) for k in (1, 1, 3, 6)]
    return found


def test_shared_prefixes_are_computed_once(model, monkeypatch):
    requests = few_shot_requests()
    scorer = PackedScorer(packed_model(model), model._activate, n_members=3, token_budget=80)
    with torch.inference_mode():
        found = dict(scorer.score(requests))
    assert_same(found, plain(model, requests))
    naive = sum(len(request.tokens) for request in requests)
    assert scorer.work.n_passes > 3
    assert scorer.work.n_computed <= 1.02 * scorer.work.n_positions < 0.3 * naive


def test_order_and_pack_size_do_not_matter(model):
    requests = few_shot_requests(5)
    forward = packed(model, requests)
    backward = packed(model, requests[::-1], budget=2000)
    assert_same(forward, {len(requests) - 1 - i: score for i, score in backward.items()})


def test_member_order_only_permutes(model, llama, tmp_path):
    adapters = random_adapters(llama, tmp_path, 3)
    names = [str(adapters / f"member_{i:02d}") for i in (2, 0, 1)]
    requests = few_shot_requests(3)
    straight = packed(LoraEnsembleLM(adapters=str(adapters), device="cpu"), requests)
    turned = packed(LoraEnsembleLM(adapters=names, device="cpu"), requests)
    for i, score in straight.items():
        np.testing.assert_allclose(score.loglikelihoods[[2, 0, 1]], turned[i].loglikelihoods, atol=1e-5)
        assert score.is_greedy == turned[i].is_greedy


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": "all-linear"},
        {"target_modules": ["up_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"layers_to_transform": [2]},
    ],
    ids=lambda lora: next(iter(lora)) + "-" + str(next(iter(lora.values()))),
)
def test_every_kind_of_lora(llama, tmp_path, lora):
    adapters = random_adapters(llama, tmp_path, 2, spread=0.1, **lora)
    model = LoraEnsembleLM(adapters=str(adapters), device="cpu")
    assert packed_model(model).shared_layers == (2 if "layers_to_transform" in lora else 0)
    requests = few_shot_requests(3)
    assert_same(packed(model, requests), plain(model, requests))


def test_greedy_that_no_member_alone_decides(model):
    """Positions left open by the members' own argmax go through the whole vocabulary."""
    rng = np.random.default_rng(5)
    requests = []
    for _ in range(40):
        context = rng.integers(0, 600, 6).tolist()
        with torch.inference_mode():
            mixture = 0.0
            for member in range(3):
                model._activate(member)
                mixture = mixture + model.model(torch.tensor([context])).logits[0, -1].softmax(-1)
        requests.append(truncate(context, [int(mixture.argmax())], 64))
    scores = packed(model, requests)
    assert all(score.is_greedy for score in scores.values())


def encoded(requests: list[TokenRequest]) -> list:
    return [(None, [*r.tokens, 0][: -len(r.targets)], list(r.targets)) for r in requests]


def run(model: LoraEnsembleLM, requests: list[TokenRequest]) -> list:
    return model._loglikelihood_tokens(encoded(requests), disable_tqdm=True)


def test_out_of_memory_halves_the_budget(model, monkeypatch, caplog):
    requests = few_shot_requests(40)
    expected = run(model, requests)
    used = model._packed_models.choose(200)
    original = used._run

    def fails_above_150_tokens(stream, *args):
        if stream.input_ids.numel() > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(stream, *args)

    monkeypatch.setattr(used, "_run", fails_above_150_tokens)
    with caplog.at_level(logging.WARNING):
        found = run(model, requests)
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], atol=1e-4)
    assert "out of memory: continuing with at most" in caplog.text


@pytest.mark.parametrize("told", [True, False], ids=["told", "not-told"])
def test_a_sliding_window_inside_the_sequences(tmp_path, caplog, monkeypatch, told):
    """By segments where the model tells its attention of the window; else request by request, as `hf`."""
    base = tiny_model(tmp_path / "tiny-mistral", "mistral", sliding_window=32)
    adapters = random_adapters(base, tmp_path / "e", 2)
    model = LoraEnsembleLM(adapters=str(adapters), device="cpu", batch_size=4)
    short, long = few_shot_requests(1)[:1], few_shot_requests(2)
    if not told:
        attend = SegmentAttention.__call__

        def without_window(self, *args, sliding_window=None, **kwargs):
            return attend(self, *args, **kwargs)

        monkeypatch.setattr(SegmentAttention, "__call__", without_window)
    with caplog.at_level(logging.WARNING):
        run(model, [TokenRequest(short[0].tokens[:20], short[0].targets)])
        assert model.work.n_computed and "request by request" not in caplog.text
        model.work = Work()
        found = run(model, long)
        assert ("request by request" in caplog.text) != told
    assert bool(model.work.n_computed) == told
    for member in range(2):
        theirs = HFLM(pretrained=str(base), peft=str(adapters / f"member_{member:02d}"), device="cpu")
        expected = [value for value, _ in theirs._loglikelihood_tokens(encoded(long), disable_tqdm=True)]
        np.testing.assert_allclose([v.members[member] for v, _ in found], expected, atol=1e-4)


def test_a_model_that_packed_rows_would_get_wrong_is_found_out(llama, ensemble, monkeypatch, caplog):
    model = LoraEnsembleLM(adapters=str(ensemble), device="cpu")
    causal = model.model.get_base_model()
    whole = causal.forward

    def scaled(*args, **kwargs):
        output = whole(*args, **kwargs)
        output.logits = output.logits * 0.8  # as some architectures do after the head
        return output

    monkeypatch.setattr(causal, "forward", scaled)
    requests = few_shot_requests(2)
    with caplog.at_level(logging.WARNING):
        found = run(model, requests)
    assert "differ from whole sequences" in caplog.text
    expected = plain(model, requests)
    np.testing.assert_allclose(
        [v.members for v, _ in found], [expected[i].loglikelihoods for i in range(8)], atol=1e-4
    )


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_bfloat16_is_no_further_from_float32_than_hf_is(architecture, request, tmp_path):
    """Two exact methods round differently; what can be asked is that neither is worse."""
    base = request.getfixturevalue(architecture)
    adapters = random_adapters(base, tmp_path / "members", 3)
    requests = [
        (None, [*r.tokens[: len(r.tokens) + 1 - len(r.targets)]], [*r.targets]) for r in few_shot_requests(20)
    ]

    def ours(dtype: str) -> np.ndarray:
        model = LoraEnsembleLM(adapters=str(adapters), device="cpu", dtype=dtype)
        found = model._loglikelihood_tokens(requests, disable_tqdm=True)
        assert model.work.n_computed
        return np.array([value.members for value, _ in found]).T

    def theirs(adapter: Path) -> list[float]:
        model = HFLM(pretrained=str(base), peft=str(adapter), device="cpu", dtype="bfloat16", batch_size=8)
        return [value for value, _ in model._loglikelihood_tokens(requests, disable_tqdm=True)]

    exact = ours("float32")
    errors = ours("bfloat16") - exact
    errors_of_hf = np.array([theirs(adapter) for adapter in sorted(adapters.iterdir())]) - exact
    assert 0 < np.sqrt(np.mean(errors**2)) < 1.1 * np.sqrt(np.mean(errors_of_hf**2))
    assert abs(errors.mean()) < 1.1 * np.sqrt(np.mean(errors_of_hf**2))


@pytest.mark.parametrize("size", [1, 10**9])
def test_tuning_only_steers(model, size):
    """A logit at a time and all of them, a token a piece and a row a piece."""
    requests = few_shot_requests(4)
    absurd = Tuning(tokens=size, masked_tokens=size, logits=size, sizes=Sizes(size, size, size, size))
    assert_same(packed(model, requests, size, absurd), packed(model, requests))


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], [1] * 9)])
def test_requests_that_cannot_be_scored(context, continuation):
    with pytest.raises(ValueError, match="token"):
        truncate(context, continuation, 8)


def test_a_base_with_its_layers_on_disk_scores_as_one_in_memory(llama, tmp_path):
    """Weights, adapters too, come and go by accelerate's hooks while a pass runs."""
    adapters = random_adapters(llama, tmp_path / "e", 2)
    model = LoraEnsembleLM(adapters=str(adapters), device="cpu")
    requests = few_shot_requests(4)
    expected = run(model, requests)
    del vars(model)["_packed_models"]  # what was tried before
    layers = model.model.get_base_model().get_decoder().layers
    for i, layer in enumerate(layers):
        disk_offload(layer, str(tmp_path / f"offload_{i}"), execution_device="cpu")
    assert {parameter.device.type for parameter in layers.parameters()} == {"meta"}
    found = run(model, requests)
    assert model._used is not None and model._used.attention == "segments"
    np.testing.assert_allclose([v.members for v, _ in found], [v.members for v, _ in expected], atol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
