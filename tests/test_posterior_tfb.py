"""TFB: the rotated form, the noise, the search for its size, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from posterior_task_fixtures import data_of, fit, make_place, source_of, write_adapter
from scipy import special, stats
from train_fixtures import one_thread, quick_tasks  # noqa: F401

from lm_eval_lora_ensemble import load_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.contract import Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.lora_layers import LoraPair, lora_pairs
from lm_eval_lora_ensemble.posterior.methods.tfb import TrainingFreePosterior, departure, rotate

QUICK = {"anchors": 8, "search_draws": 3, "steps": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("tfb"))


@pytest.fixture
def source(place):
    return source_of(place / "adapters" / "member_00")


def pair_of(out: int, rank: int, width: int, seed: int = 0, rank_of_b: int | None = None) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    if rank_of_b is not None:
        B = B[:, :rank_of_b] @ torch.randn(rank_of_b, rank, generator=generator, dtype=torch.float64)
        B = B.float().double()  # as it would be stored: rank-deficient up to rounding
    return LoraPair("layer", torch.randn(rank, width, generator=generator, dtype=torch.float64), B)


def posterior_of(source: Source, sigma: float) -> TrainingFreePosterior:
    adapter = source.adapters[0]
    return TrainingFreePosterior(rotate(lora_pairs(adapter, "tfb"), "it"), adapter.state, sigma, {}, {})


@pytest.mark.parametrize("shape", [(12, 4, 9), (3, 5, 7), (4, 4, 4), (6, 1, 2)])
def test_the_product_stays_and_b_is_orthogonal(shape):
    pair = pair_of(*shape)
    (layer,) = rotate([pair], "it")
    assert layer.A.shape == pair.A.shape
    assert layer.B.shape == pair.B.shape
    assert torch.allclose(layer.B @ layer.A, pair.B @ pair.A, atol=1e-10)
    d = torch.from_numpy(np.linalg.svd(pair.B.numpy(), compute_uv=False))
    gram = torch.zeros(shape[1], shape[1], dtype=torch.float64)
    gram[: len(d), : len(d)] = torch.diag(d**2)
    assert torch.allclose(layer.B.T @ layer.B, gram, atol=1e-10)
    assert torch.allclose(layer.spread[: len(d)], 1 / d)
    assert not layer.spread[len(d) :].any()


def test_an_output_head_needs_no_square_of_its_rows():
    """[40 000, 40 000] in float64 are 12.8 GB."""
    (rotated,) = rotate([pair_of(40_000, 4, 8)], "it")
    assert rotated.B.shape == (40_000, 4) and bool((rotated.spread > 0).all())


def test_float32_keeps_the_product_to_1e5(source):
    posterior = posterior_of(source, 0.0)
    drawn = posterior.draw(torch.Generator().manual_seed(0))
    state = source.adapters[0].state
    assert drawn.keys() == state.keys()
    for name in (name for name in state if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        assert torch.allclose(drawn[other] @ drawn[name], state[other] @ state[name], atol=1e-5)
        assert not torch.allclose(drawn[name], state[name], atol=1e-2)


def test_no_noise_where_b_has_no_rank():
    (layer,) = rotate([pair_of(12, 4, 9, rank_of_b=2)], "it")
    assert (layer.spread > 0).tolist() == [True, True, False, False]
    draw = TrainingFreePosterior([layer], {}, 5.0, {}, {}).draw(torch.Generator().manual_seed(1))
    assert torch.equal(draw[layer.a_name][2:], layer.A[2:].float())
    assert torch.isfinite(draw[layer.a_name]).all()


def test_mean_and_covariance_of_draws_are_the_declared_ones():
    """Two chi-square tests and 66 z-scores over 4000 draws, wrong for one seed in 1000 together; the seed is fixed."""
    pair, sigma, n = pair_of(6, 3, 4), 0.3, 4000
    (layer,) = rotate([pair], "it")
    posterior = TrainingFreePosterior([layer], {}, sigma, {}, {})
    generator = torch.Generator().manual_seed(5)
    draws = torch.stack([posterior.draw(generator)[layer.a_name] for _ in range(n)]).double().numpy()
    # declared independently of the code: numpy's decomposition, rows up to their signs, which a Gaussian does not see
    u, d, vt = np.linalg.svd(pair.B.numpy(), full_matrices=False)
    signs = np.sign((vt @ pair.A.numpy() * layer.A.numpy()).sum(1, keepdims=True))
    white = ((draws - signs * (vt @ pair.A.numpy())) * d[:, None] / sigma).reshape(n, -1)
    error_rate = 1e-3
    low, high = stats.chi2.ppf([error_rate / 6, 1 - error_rate / 6], white.size)
    assert low < (white**2).sum() < high
    mean = n * (white.mean(0) ** 2).sum()
    assert mean < stats.chi2.ppf(1 - error_rate / 3, white.shape[1])
    correlations = (white.T @ white / math.sqrt(n))[np.triu_indices(white.shape[1], 1)]
    assert np.abs(correlations).max() < stats.norm.ppf(1 - error_rate / 6 / len(correlations))
    # through B' it is noise of one size in every direction of B: covariance σ² U Uᵀ of a column of the weight's change
    change = (layer.B.numpy() @ (draws - draws.mean(0)))[:, :, 0]
    assert np.abs(change.T @ change / n - sigma**2 * u @ u.T).max() < 6 * sigma**2 / math.sqrt(n)


def test_draws_differ_repeat_and_are_float32(source):
    posterior = posterior_of(source, 0.1)
    one, two = (posterior.draw(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    again = posterior.draw(torch.Generator().manual_seed(1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(not torch.equal(one[name], two[name]) for name in one if "lora_A" in name)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}


def test_without_noise_the_scores_are_the_source_s(place, source, tmp_path):
    posterior = posterior_of(source, 1e-9)
    folder = write_adapter(tmp_path / "drawn", source, posterior.draw(torch.Generator().manual_seed(0)))
    texts = ["Question: What colour is the sky?\nAnswer:"] * 3, [" blue", " dark orange", " red"]
    scores = [
        load_ensemble(None, path, dtype="float32", device="cpu", batch_size=8).loglikelihoods(*texts)
        for path in (folder, source.adapters[0].folder)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.parametrize("criterion", ["nll", "predictions"])
@pytest.mark.parametrize("labels", ["own", "gold"])
def test_the_chosen_sigma_passed_with_draws_scored_alone(place, source, criterion, labels):
    """The last sigma that passed is taken, and its measure is what these draws give, computed here again."""
    data = data_of(place, source)
    posterior = fit("tfb", source, data, criterion=criterion, labels=labels, choice_temperature=3.0, **QUICK)
    settings = json.loads(json.dumps(posterior.settings))
    path = settings["path"]
    chosen = next(step for step in path if step["at"] == settings["sigma"])
    assert chosen["passed"]
    assert min(step["at"] for step in path if not step["passed"]) > settings["sigma"]
    assert settings["anchors"]["tasks"] == {"colours": [0, 5, 11, 16, 22, 27, 33, 38]}
    assert chosen["value"] <= settings["tolerance"] == {"nll": 0.003, "predictions": 0.01}[criterion]
    assert posterior.config == source.adapters[0].config

    from lm_eval_lora_ensemble.posterior.predictive import search_generators

    anchors = data.sample(8)
    own = special.log_softmax(data.loglikelihoods(anchors) / 3.0, axis=-1)
    states = [posterior.draw(generator) for generator in search_generators(0, 3)]
    members = [special.softmax(data.loglikelihoods(anchors, state) / 3.0, axis=-1) for state in states]
    mixture = np.mean(members, axis=0)
    if criterion == "predictions":
        expected = np.mean(mixture.argmax(1) != own.argmax(1))
    else:
        answers = own.argmax(1) if labels == "own" else anchors.is_gold.argmax(1)
        rows = np.arange(len(answers))
        expected = np.log(mixture[rows, answers]).mean() / own[rows, answers].mean() - 1
    assert chosen["value"] == pytest.approx(expected, abs=1e-9)


def test_departure_counts_what_it_says():
    own = np.log([[0.5, 0.5 - 1e-9, 1e-9], [0.2, 0.7, 0.1]])
    right = np.array([[True, False, False], [False, True, True]])
    flipped = np.log([[0.4, 0.5, 0.1], [0.2, 0.7, 0.1]])
    assert departure(flipped, own, right, "predictions") == 0.5
    before = -(np.log(0.5) + np.log(0.8)) / 2
    after = -(np.log(0.4) + np.log(0.8)) / 2
    assert departure(flipped, own, right, "nll") == pytest.approx(after / before - 1)
    certain = np.log([[1.0, 1e-300]])
    assert departure(certain, np.array([[0.0, -np.inf]]), np.array([[True, False]]), "nll") == 0
    assert (
        departure(np.log([[0.9, 0.1]]), np.array([[0.0, -np.inf]]), np.array([[True, False]]), "nll")
        == math.inf
    )


def test_the_base_s_own_tensors_in_the_file_are_carried_along(tmp_path):
    """PEFT saves the frozen head with an adapter of it."""
    place = make_place(tmp_path, tied=False, target_modules=["q_proj", "lm_head"])
    source = source_of(place / "adapters" / "member_00")
    state = source.adapters[0].state
    carried = [name for name in state if "lora_" not in name]
    assert "base_model.model.lm_head.base_layer.weight" in carried
    posterior = fit("tfb", source, data_of(place, source), anchors=4, search_draws=2, steps=0)
    drawn = posterior.draw(torch.Generator().manual_seed(0))
    assert all(torch.equal(drawn[name], state[name]) for name in carried)
    folder = write_adapter(tmp_path / "drawn", source, drawn)
    texts = ["The sky is"] * 2, [" blue", " dark orange"]
    assert np.isfinite(
        load_ensemble(None, folder, dtype="float32", device="cpu").loglikelihoods(*texts)
    ).all()


def changed(source: Source, state: dict | None = None, **config: object) -> Source:
    """The source with another state or configuration."""
    old = source.adapters[0]
    new = SourceAdapter(
        old.name, old.folder, old.sha256, {**old.config, **config}, old.state if state is None else state
    )
    return Source(source.base_model, source.revision, (new,))


REFUSALS = {
    "dora": (lambda s: changed(s, use_dora=True), "is a DoRA adapter"),
    "untrained": (
        lambda s: changed(s, {n: t * (0 if "lora_B" in n else 1) for n, t in s.adapters[0].state.items()}),
        "untrained: every B is 0",
    ),
    "embedding": (
        lambda s: changed(
            s, {**s.adapters[0].state, "base_model.model.e.lora_embedding_A": torch.ones(2, 3)}
        ),
        r"holds base_model\.model\.e\.lora_embedding_A; tfb handles A and B of linear layers only",
    ),
    "saved": (
        lambda s: changed(s, {**s.adapters[0].state, "base_model.model.lm_head.weight": torch.ones(2, 3)}),
        r"holds base_model\.model\.lm_head\.weight",
    ),
    "convolution": (
        lambda s: changed(s, {"base_model.model.c.lora_A.weight": torch.ones(2, 3, 1, 1)}),
        "c is no linear layer's pair",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_adapters_it_is_wrong_for_are_refused_in_one_line_before_a_model_is_loaded(source, case):
    change, message = REFUSALS[case]
    refused = change(source)
    with pytest.raises(EnsembleError, match=message) as error:
        fit("tfb", refused, None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "mine"}, "labels=mine: give own or gold"),
        ({"criterion": "ece"}, "criterion=ece: give nll or predictions"),
        ({"anchors": 0}, "anchors=0: give a whole number from 1"),
        ({"start": -1.0}, "start=-1"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"choice_scores": "words"}, "choice_scores=words"),
        ({"choice_temperature": 0.0}, "choice_temperature=0.0"),
    ],
)
def test_options_out_of_range_are_refused(source, options, message):
    with pytest.raises(EnsembleError, match=message):
        fit("tfb", source, None, **options)


def test_no_task_is_refused(source):
    with pytest.raises(EnsembleError, match="tfb needs a task"):
        fit("tfb", source, None)
