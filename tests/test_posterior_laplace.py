"""Laplace on a tiny language model: curvature, the choice of the prior precision, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from posterior_task_fixtures import data_of, fit, make_place, source_of, write_adapter
from scipy import special
from test_posterior_kfac import kron
from train_fixtures import one_thread, quick_tasks  # noqa: F401

from lm_eval_lora_ensemble import load_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.contract import Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.kfac import root_of_softmax
from lm_eval_lora_ensemble.posterior.lora_layers import lora_pairs
from lm_eval_lora_ensemble.posterior.methods.laplace import curvature
from lm_eval_lora_ensemble.posterior.predictive import search_generators
from lm_eval_lora_ensemble.train.scale import SUMMED

QUICK = {"documents": 6, "prior_documents": 8, "search_draws": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("laplace"))


@pytest.fixture(scope="module")
def with_head(tmp_path_factory):
    """Adapters on the output head of a model that does not tie it."""
    return make_place(tmp_path_factory.mktemp("head"), tied=False, target_modules=["q_proj", "lm_head"])


@pytest.fixture
def source(place):
    return source_of(place / "adapters" / "member_00")


def last_curvature(place, source):
    """Curvature of the head's B on one document of single-token answers, and what the data say of it."""
    data = data_of(place, source, "letters")
    sample = data.sample(1)
    pairs = lora_pairs(source.adapters[0], "laplace")
    (weight,) = curvature(data, sample, SUMMED, pairs, "last", 1.0).values()
    return data, sample, weight


def test_of_the_output_head_it_is_the_exact_fisher_matrix(with_head):
    """One document whose answers are one token: one position, so the factors are exact (see test_posterior_kfac)."""
    source = source_of(with_head / "adapters" / "member_00")
    data, sample, weight = last_curvature(with_head, source)
    module = data.model.base_model.model.lm_head.lora_B[data.adapter_name]
    assert not module.weight.requires_grad
    module.weight.requires_grad_(True)
    scores = next(data.differentiable(sample, SUMMED))
    assert len(data.loglikelihoods(sample)[0]) == scores.shape[1] == 3
    rows = [torch.autograd.grad(s, module.weight, retain_graph=True)[0].flatten() for s in scores[0]]
    half = root_of_softmax(scores.detach())[:, 0]
    jacobian = (half @ torch.stack(rows)).double().numpy()
    exact = jacobian.T @ jacobian
    assert kron(weight.factors) == pytest.approx(exact, abs=1e-5 * np.abs(exact).max())


def test_of_the_output_head_draws_have_the_linearised_predictive(with_head):
    source = source_of(with_head / "adapters" / "member_00")
    data = data_of(with_head, source, "letters")
    sample = data.sample(3)
    posterior = fit("laplace", source, data, layers="last", documents=6, prior_precision=0.25)
    drawn = posterior.draw(torch.Generator().manual_seed(0))
    (name,) = posterior.weights
    assert name == "base_model.model.lm_head.lora_B.weight"
    assert all(torch.equal(drawn[n], source.adapters[0].state[n]) for n in drawn if n != name)
    module = data.model.base_model.model.lm_head.lora_B[data.adapter_name]
    module.weight.requires_grad_(True)
    change = (drawn[name] - source.adapters[0].state[name]).flatten()
    own, moved = data.loglikelihoods(sample), data.loglikelihoods(sample, drawn)
    for d, scores in enumerate(data.differentiable(sample, SUMMED)):
        finite = [s for s in scores[0] if torch.isfinite(s)]
        rows = [torch.autograd.grad(s, module.weight, retain_graph=True)[0].flatten() for s in finite]
        linear = (torch.stack(rows) @ change).numpy()
        true = moved[d, : len(finite)] - own[d, : len(finite)]
        assert np.ptp(true) > 0.05
        # the log of the softmax's normaliser over the vocabulary is common to all choices
        assert true - true.mean() == pytest.approx(linear - linear.mean(), abs=5e-4)


def test_curvature_grows_with_the_documents_it_stands_for(place, source):
    posteriors = [
        fit("laplace", source, data_of(place, source, limit=limit), documents=4, prior_precision=1.0, **more)
        for limit, more in ((8, {}), (8, {"training_size": 80}))
    ]
    few, many = (posterior.weights for posterior in posteriors)
    assert posteriors[0].settings["training_size"] == 8
    for name in few:
        assert torch.allclose(many[name].curvature, 10 * few[name].curvature)
        assert float(few[name].curvature.max()) > 0
    assert len(few) == 2 * 2 * 2


def test_a_narrow_posterior_scores_as_the_source(place, source, tmp_path):
    posterior = fit("laplace", source, data_of(place, source), documents=2, prior_precision=1e14)
    folder = write_adapter(tmp_path / "drawn", source, posterior.draw(torch.Generator().manual_seed(0)))
    texts = ["Question: What colour is the sky?\nAnswer:"] * 3, [" blue", " dark orange", " red"]
    scores = [
        load_ensemble(None, path, dtype="float32", device="cpu", batch_size=8).loglikelihoods(*texts)
        for path in (folder, source.adapters[0].folder)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_the_prior_precision_is_the_one_whose_draws_have_the_least_nll(place, source):
    data = data_of(place, source)
    posterior = fit("laplace", source, data, choice_temperature=3.0, **QUICK)
    settings = json.loads(json.dumps(posterior.settings))
    chosen = min(settings["path"], key=lambda step: step["value"])
    assert settings["prior_precision"] == chosen["at"] == posterior.precision
    assert settings["documents"] == {"split": "training", "tasks": {"colours": [0, 7, 14, 22, 29, 36]}}
    assert settings["held_out"]["split"] == "validation"
    held_out = data.sample(8, split="validation")
    golds = held_out.is_gold.argmax(1)
    members = [
        special.softmax(data.loglikelihoods(held_out, posterior.draw(generator)) / 3.0, axis=-1)
        for generator in search_generators(0, 3)
    ]
    nll = -np.log(np.mean(members, axis=0)[np.arange(8), golds]).mean()
    assert chosen["value"] == pytest.approx(nll, abs=1e-9)
    assert not any(p.requires_grad for p in data.model.parameters())


def test_held_out_documents_are_others_where_validation_is_judged(place, source):
    data = data_of(place, source, "judged_on_validation", limit=12)
    settings = fit("laplace", source, data, **QUICK).settings
    used, held_out = (
        set(settings[key]["tasks"]["judged_on_validation"]) for key in ("documents", "held_out")
    )
    assert settings["held_out"]["split"] == "training"
    assert len(used) == 6 == len(held_out)
    assert not used & held_out


def test_marginal_likelihood_needs_no_held_out_documents(place, source):
    settings = fit("laplace", source, data_of(place, source), prior="marglik", documents=6).settings
    assert settings["prior_precision"] == settings["evidence_precision"]
    assert settings["held_out"] is None
    assert settings["path"] == []


def test_choices_of_other_lengths_have_another_curvature(place, source):
    curvatures = [
        fit(
            "laplace", source, data_of(place, source), documents=4, prior_precision=1.0, choice_scores=scores
        ).weights
        for scores in ("sum", "chars")
    ]
    name = next(iter(curvatures[0]))
    assert curvatures[1][name].curvature.max() < 0.3 * curvatures[0][name].curvature.max()


def test_dora_and_no_task_are_refused(source):
    old = source.adapters[0]
    dora = SourceAdapter(old.name, old.folder, old.sha256, {**old.config, "use_dora": True}, old.state)
    with pytest.raises(EnsembleError, match="member_00 is a DoRA adapter"):
        fit("laplace", Source(source.base_model, None, (dora,)), None)
    with pytest.raises(EnsembleError, match="laplace needs a task"):
        fit("laplace", source, None)
    with pytest.raises(EnsembleError, match="layers=first: give all or last"):
        fit("laplace", source, None, layers="first")
