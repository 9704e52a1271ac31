"""What the methods draw, against what they declare, other people's layers, and formulas written out again.

Statistical tests have fixed seeds. Each compares at most 60 numbers with their quantiles of 1e-6, so that a right
implementation would fail one with a probability of 1.2e-4 had the seeds been drawn now.
"""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from posterior_fixtures import CONFIG, WEIGHTS, flat, make_run, weights
from safetensors.torch import save_file
from scipy import stats

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.posterior.generators import generator_of
from lm_eval_lora_ensemble.posterior.methods.swag import Moments, SwagPosterior
from lm_eval_lora_ensemble.posterior.plan import Settings
from lm_eval_lora_ensemble.posterior.registry import METHODS
from lm_eval_lora_ensemble.posterior.sources import find_source, read_sources

DRAWS = 2000
RARE = 1e-6


def fitted(name, adapters, **options):
    """Fit one method to the only member of a source."""
    method = METHODS.find(name)
    settings = Settings.of(method, options)
    (source,) = read_sources(
        find_source(str(adapters), settings.command["member"]), method, kept=settings.command.get("kept")
    )
    return source, method.fit(source, None, **settings.options)


@pytest.fixture(scope="module")
def run(ensemble, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", ensemble / "member_00", epochs=7)


def states(run, last=None):
    snapshots = [weights(folder) for folder in sorted((run / "member_00").glob("epoch_*"))]
    return snapshots[-last:] if last else snapshots


# ------------------------------------------------------------------------------------------------- SWAG


def swag_by_the_paper(snapshots, rank):
    """Algorithm 1 of arXiv 1902.02476, on flat vectors: θ̄, the diagonal, and the columns of D̂."""
    theta = [flat(snapshot).numpy() for snapshot in snapshots]
    mean, second, columns = theta[0], theta[0] ** 2, [theta[0] - theta[0]]
    for n, value in enumerate(theta[1:], start=1):
        mean = (n * mean + value) / (n + 1)
        second = (n * second + value**2) / (n + 1)
        if len(columns) == rank:
            columns.pop(0)
        columns.append(value - mean)
    return mean, second - mean**2, np.stack(columns, axis=1)


@pytest.mark.parametrize(("rank", "last"), [(5, None), (2, None), (7, None), (3, 4)])
def test_swag_keeps_what_the_papers_algorithm_keeps(run, rank, last):
    _, posterior = fitted("swag", run, K=rank, **({"last": last} if last else {}))
    mean, diagonal, columns = swag_by_the_paper(states(run, last), rank)
    names = sorted(posterior.moments)

    def joined(part):
        return np.concatenate([part(posterior.moments[name]) for name in names], axis=-1)

    np.testing.assert_allclose(joined(lambda m: m.mean.flatten().numpy()), mean, atol=1e-7)
    np.testing.assert_allclose(joined(lambda m: m.deviation.flatten().numpy()) ** 2, diagonal, atol=1e-8)
    np.testing.assert_allclose(joined(lambda m: m.D.flatten(1).numpy()), columns.T, atol=1e-7)


def directions(mean, columns, n=20):
    """Unit vectors to look along: coordinates, random ones over all tensors, and the deviations themselves."""
    random = np.random.default_rng(0)
    chosen = [np.eye(1, mean.size, k=k).ravel() for k in random.integers(mean.size, size=n)]
    chosen += list(random.normal(size=(n, mean.size)))
    chosen += [column for column in columns.T if np.abs(column).max() > 0]
    return np.stack([vector / np.linalg.norm(vector) for vector in chosen], axis=1)


def rejected(draws, mean, variance):
    """Whether draws [n, d] of d normal numbers have another mean or variance than declared."""
    n = len(draws)
    z = (draws.mean(0) - mean) / np.sqrt(variance / n)
    ratio = (n - 1) * draws.var(0, ddof=1) / variance
    low, high = stats.chi2.ppf([RARE / 2, 1 - RARE / 2], n - 1)
    return bool((np.abs(z) > stats.norm.isf(RARE / 2)).any() or (ratio < low).any() or (ratio > high).any())


def test_swags_draws_have_the_declared_mean_and_covariance(run):
    source, posterior = fitted("swag", run, scale=0.5, K=5)
    mean, diagonal, columns = swag_by_the_paper(states(run), 5)
    along = directions(mean, columns)
    draws = np.stack(
        [
            flat(posterior.draw(generator_of(0, "swag", source.sha256, n))).numpy() @ along
            for n in range(DRAWS)
        ]
    )
    # the paper: half the diagonal, and D̂D̂ᵀ/(2(K − 1))
    variance = along.T**2 @ diagonal / 2 + ((columns.T @ along) ** 2).sum(0) / (2 * (5 - 1))
    assert not rejected(draws, mean @ along, variance)
    # what would not be noticed otherwise: K for K − 1, the diagonal alone, a mean a tenth of a deviation off
    assert rejected(
        draws, mean @ along, along.T**2 @ diagonal / 2 + ((columns.T @ along) ** 2).sum(0) / (2 * 5)
    )
    assert rejected(draws, mean @ along, along.T**2 @ diagonal / 2)
    assert rejected(draws, mean @ along + 0.2 * np.sqrt(variance), variance)


def test_swag_of_scale_0_and_swa_are_the_mean(run):
    _, swa = fitted("swa", run)
    source, swag = fitted("swag", run, scale=0)
    mean = {
        name: np.mean([state[name].numpy() for state in states(run)], axis=0, dtype=np.float64)
        for name in states(run)[0]
    }
    drawn = swag.draw(generator_of(1, "swag", source.sha256, 0))
    for name, tensor in swa.take(0).items():
        np.testing.assert_allclose(tensor.numpy(), mean[name], atol=1e-7)
        assert torch.equal(tensor, drawn[name])


def test_a_tensor_that_does_not_change_stays_what_it_is_and_half_precision_widens():
    constant = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    moments = Moments.of([constant] * 6, 5)
    drawn = SwagPosterior({"x": moments}, 0.5, {}, {}).draw(torch.Generator().manual_seed(0))["x"]
    assert drawn.dtype == torch.float32 and torch.equal(drawn, constant.float())


def test_the_deviations_weights_are_shared_by_all_tensors():
    deviations = torch.tensor([[0.0], [1.0]])
    moments = Moments(torch.zeros(1), torch.zeros(1), deviations)
    drawn = SwagPosterior({"a": moments, "b": moments}, 1.0, {}, {}).draw(torch.Generator().manual_seed(3))
    assert torch.equal(drawn["a"], drawn["b"]) and drawn["a"].abs() > 0


# ------------------------------------------------------------------------------------- snapshots and their mean


def test_snapshots_are_taken_bit_for_bit_from_the_last_back(run):
    _, posterior = fitted("snapshot", run, every=2)
    expected = states(run)[::-1][::2]
    assert len(posterior) == 4
    for number, state in enumerate(expected):
        taken = posterior.take(number)
        assert taken.keys() == state.keys() and all(torch.equal(taken[n], state[n]) for n in state)
        assert posterior.origin(number).name == f"member_00/epoch_{7 - 2 * number:02d}"


def test_steps_are_taken_where_there_are_any(ensemble, tmp_path):
    both = make_run(tmp_path / "both", ensemble / "member_00", epochs=2, steps=3)
    assert [a.name for a in fitted("snapshot", both)[0].adapters] == [
        f"member_00/step_{n:08d}" for n in (10, 20, 30)
    ]
    assert len(fitted("snapshot", both, kept="epochs")[0].adapters) == 2
    # a member's folder alone, as somebody may have copied it, without a manifest
    assert len(fitted("snapshot", both / "member_00")[0].adapters) == 3


# ---------------------------------------------------------------------------------------------- dropout


@pytest.fixture(scope="module")
def dropped(ensemble):
    """Two thousand masks of one adapter's layers, [draws, layers, inputs], in units of the adapter's own A."""
    source, posterior = fitted("dropout", ensemble / "member_00", p=0.2)
    own = weights(ensemble / "member_00")
    layers = sorted(name for name in own if "lora_A" in name)
    masks = []
    for number in range(DRAWS):
        drawn = posterior.draw(generator_of(0, "dropout", source.sha256, number))
        assert drawn.keys() == own.keys()
        ratio = [drawn[name] / own[name] for name in layers]
        assert all(torch.allclose(one, one[:1].expand_as(one), atol=1e-5) for one in ratio)  # whole columns
        masks.append(torch.stack([one[0] for one in ratio]))
        if not number:
            assert all(torch.equal(drawn[name], own[name]) for name in own if name not in layers)
    return torch.stack(masks).numpy()


def test_dropouts_masks_are_0_or_the_inverse_of_what_is_kept(dropped):
    assert np.minimum(np.abs(dropped), np.abs(dropped - 1 / 0.8)).max() < 1e-5


def test_the_mean_over_masks_is_the_adapter(dropped):
    kept = (dropped > 0).sum(axis=0).ravel()
    quantile = RARE / 2 * 60 / len(kept)  # more numbers, each with a smaller chance
    assert kept.min() >= stats.binom.ppf(quantile, DRAWS, 0.8)
    assert kept.max() <= stats.binom.isf(quantile, DRAWS, 0.8)
    overall = stats.binomtest(int(kept.sum()), dropped.size, 0.8)
    assert overall.pvalue > RARE


def test_masks_of_layers_and_inputs_are_independent(dropped):
    masks = (dropped > 0).reshape(DRAWS, -1).astype(float)
    correlation = np.corrcoef(masks.T)[np.triu_indices(masks.shape[1], 1)]
    bound = stats.norm.isf(RARE / 2 / len(correlation) * 60) / math.sqrt(DRAWS)
    assert np.abs(correlation).max() < bound
    assert stats.kstest(correlation * math.sqrt(DRAWS), "norm").statistic < 0.02


class Held(torch.nn.Module):
    """Dropout whose mask has been drawn."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_a_draw_is_pefts_own_dropout_with_the_mask_held(llama, ensemble, tmp_path):
    source, posterior = fitted("dropout", ensemble / "member_00", p=0.3)
    drawn = posterior.draw(generator_of(7, "dropout", source.sha256, 0))
    shutil.copytree(ensemble / "member_00", tmp_path / "drawn")
    save_file(drawn, tmp_path / "drawn" / WEIGHTS)

    def load(folder):
        base = transformers.AutoModelForCausalLM.from_pretrained(llama)
        return peft.PeftModel.from_pretrained(base, folder).eval()

    held, ids = load(ensemble / "member_00"), torch.arange(40)[None] * 7
    without = held(ids).logits
    for name, layer in held.named_modules():
        if hasattr(layer, "lora_dropout"):
            key = f"{name}.lora_A.weight"
            factor = (drawn[key] / weights(ensemble / "member_00")[key])[0]
            layer.lora_dropout["default"] = Held(factor)
    with torch.no_grad():
        expected, found = held(ids).logits, load(tmp_path / "drawn")(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert (expected - without).abs().max() > 0.1


def test_p_is_the_adapters_own_unless_it_is_given(ensemble, tmp_path, edit_json):
    copy = shutil.copytree(ensemble / "member_00", tmp_path / "a")
    edit_json(copy / CONFIG, lora_dropout=0.25)
    assert fitted("dropout", copy)[1].settings == {"p": 0.25}
    assert fitted("dropout", copy, p=0.5)[1].settings == {"p": 0.5}


# --------------------------------------------------------------------------------------------- refusals


def test_each_refusal_of_an_adapter_is_one_line(llama, ensemble, tmp_path, edit_json):
    def adapter(name, **config):
        copy = shutil.copytree(ensemble / "member_00", tmp_path / name)
        edit_json(copy / CONFIG, **config)
        return copy

    plain = adapter("plain")
    dora = adapter("dora", use_dora=True)
    state = weights(dora)
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(tensor))
        for name, tensor in state.items()
        if "lora_B" in name
    }
    save_file({**state, **magnitudes}, dora / WEIGHTS)
    saved = adapter("saved", modules_to_save=["lm_head"])
    head = {"base_model.model.lm_head.weight": torch.zeros(600, 48)}
    save_file({**weights(saved), **head}, saved / WEIGHTS)
    embedded = adapter("embedded", target_modules=["q_proj", "v_proj", "embed_tokens"])
    embedding = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 600),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(48, 4),
    }
    save_file({**weights(embedded), **embedding}, embedded / WEIGHTS)
    tied_off = adapter("tied_off", target_modules=["q_proj", "v_proj"])
    carried = {"base_model.model.lm_head.base_layer.weight": torch.zeros(600, 48)}
    save_file({**weights(tied_off), **carried}, tied_off / WEIGHTS)
    assert torch.equal(  # the base's own, which PEFT saves with an adapter of the head
        fitted("dropout", tied_off, p=0.1)[1].draw(torch.Generator())[
            "base_model.model.lm_head.base_layer.weight"
        ],
        torch.zeros(600, 48),
    )
    for source, options, said in (
        (plain, {}, "was trained without dropout .* give p="),
        (plain, {"p": 0}, "p=0: give a number above 0 and below 1"),
        (plain, {"p": 1}, "p=1: give a number above 0 and below 1"),
        (plain, {"p": "half"}, "p=half: give a number"),
        (dora, {"p": 0.1}, "is DoRA"),
        (saved, {"p": 0.1}, r"lm_head\.weight, which is trained without LoRA's dropout"),
        (embedded, {"p": 0.1}, "lora_embedding_A, which is trained without"),
        (llama, {"p": 0.1}, "whole model; an adapter that was merged"),
    ):
        with pytest.raises(EnsembleError, match=said) as refused:
            fitted("dropout", source, **options)
        assert "\n" not in str(refused.value)


def test_each_refusal_of_snapshots_is_one_line(ensemble, run, tmp_path, edit_json):
    few = make_run(tmp_path / "few", ensemble / "member_00", epochs=1)
    odd = make_run(tmp_path / "odd", ensemble / "member_00", epochs=6)
    edit_json(odd / "member_00" / "epoch_02" / CONFIG, lora_alpha=9)
    other = make_run(tmp_path / "other", ensemble / "member_00", epochs=6)
    third = other / "member_00" / "epoch_03"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in weights(third).items()}, third / WEIGHTS)
    none = ensemble / "member_00"
    for method, source, options, said in (
        ("swag", few, {}, r"swag with K=5 needs at least 5 snapshots and has 1 of .*few"),
        ("swag", run, {"last": 4}, "needs at least 5 snapshots and has 4"),
        ("swag", run, {"K": 1}, "K=1: give a whole number from 2"),
        ("swag", run, {"scale": -1}, "scale=-1: give a number from 0"),
        ("swag", run, {"last": 9}, "last=9: .* has 7 snapshots"),
        ("swa", few, {}, "swa needs at least 2 snapshots and has 1"),
        ("snapshot", run, {"every": 7}, "every=7 leaves one of the 7 snapshots"),
        ("snapshot", odd, {}, "epoch_01 and member_00/epoch_02 differ in lora_alpha"),
        ("swag", other, {}, r"member_00/epoch_03 differ in base_model\.model"),
        ("snapshot", none, {}, "no kept epochs or steps, which snapshot needs"),
        ("snapshot", run, {"kept": "steps"}, "no kept steps"),
        ("snapshot", run, {"kept": "step"}, "kept=step: give epochs or steps; did you mean steps"),
        ("snapshot", run, {"member": 3}, "member=3: .* has 1 members"),
    ):
        with pytest.raises(EnsembleError, match=said) as refused:
            fitted(method, source, **options)
        assert "\n" not in str(refused.value)


def test_settings_say_what_was_chosen(run):
    assert fitted("swag", run)[1].settings == {"scale": 0.5, "K": 5, "snapshots": 7}
    assert fitted("swa", run, last=3)[1].settings == {"snapshots": 3}
    assert fitted("snapshot", run)[1].settings == {"every": 1}
    assert json.dumps(fitted("multiswag", run)[1].settings)
