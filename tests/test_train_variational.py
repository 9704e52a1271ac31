"""Variational members: IVON against ivon-opt, BLoB against autograd and torch.distributions, and what both promise."""

import json

import ivon
import numpy as np
import pytest
import torch
from scipy.stats import chi2
from test_train_run import StopError, contents
from torch.distributions import Normal, kl_divergence
from train_fixtures import (  # noqa: F401
    largest_difference,
    make_recipe,
    make_trainer,
    one_thread,
    quick_tasks,
    train_steps,
)

from lm_eval_lora_ensemble.cli import main
from lm_eval_lora_ensemble.disk import sha256
from lm_eval_lora_ensemble.ensemble.members import find_ensemble
from lm_eval_lora_ensemble.errors import EnsembleError, one_line
from lm_eval_lora_ensemble.posterior.contract import Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.registry import METHODS
from lm_eval_lora_ensemble.train import blob
from lm_eval_lora_ensemble.train.blob import BlobOptimiser
from lm_eval_lora_ensemble.train.engine import Engine
from lm_eval_lora_ensemble.train.ivon import IvonOptimiser
from lm_eval_lora_ensemble.train.joint import JointEngine
from lm_eval_lora_ensemble.train.optimiser import MemberTensors, draw_seed
from lm_eval_lora_ensemble.train.plain import PlainEngine
from lm_eval_lora_ensemble.train.posterior_state import FILE_NAME, PosteriorState
from lm_eval_lora_ensemble.train.run import train_members

# far larger noise than anybody trains with, so that what it does shows
IVON = {"optimizer": "ivon", "learning_rate": 0.5, "ivon_ess": 1e5, "weight_decay": 1e-3, "ivon_beta2": 0.99}
BLOB = {"posterior": "blob", "blob_epsilon": 0.3}
METHOD_KEYS = {"ivon": IVON, "blob": BLOB}

A_NAME, B_NAME = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
FALSE_ALARMS = 1e-4  # of each statistical test, were its seed drawn anew


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variational")
    make_recipe(folder)
    return folder


def toy_tensors():
    """An A [2, 3] and a B [4, 2] as one flat parameter, and what they are regressed on."""
    torch.manual_seed(3)
    shapes = [torch.Size((2, 3)), torch.Size((4, 2))]
    parameter = torch.nn.Parameter(torch.randn(14) * 0.3)
    return MemberTensors([parameter], [A_NAME, B_NAME], shapes), torch.randn(32, 3), torch.randn(32, 4)


def toy_loss(A, B, x, y):
    return (x @ A.mT @ B.mT - y).square().mean()


def toy_parts(flat):
    return flat[:6].view(2, 3), flat[6:].view(4, 2)


# ------------------------------------------------------------------------------------------------- IVON


def ivons_own(parameters, recipe):
    return ivon.IVON(
        parameters,
        lr=recipe.learning_rate,
        ess=recipe.ivon_ess,
        hess_init=recipe.ivon_hess_init,
        beta1=recipe.ivon_beta1,
        beta2=recipe.ivon_beta2,
        weight_decay=recipe.weight_decay,
        rescale_lr=False,
        clip_radius=float("inf") if recipe.ivon_clip_radius is None else recipe.ivon_clip_radius,
    )


@pytest.mark.parametrize("radius", [1e-1, None])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_the_ivon_step_is_ivon_opts(folder, radius, decay):
    """Forty steps of a regression, the same noise fed to both; the last ones at another rate."""
    keys = {"learning_rate": 0.02, "ivon_ess": 1e3, "ivon_hess_init": 0.1, "ivon_beta2": 0.95}
    recipe = make_recipe(
        folder,
        optimizer="ivon",
        **keys,
        ivon_clip_radius=radius,
        weight_decay=decay,
        gradient_clip=None,
        swa_start=30,
        swa_learning_rate=0.005,
    )
    tensors, x, y = toy_tensors()
    ours = IvonOptimiser(tensors, recipe, 40, seed=5)
    parameter = torch.nn.Parameter(tensors.flat())
    theirs = ivons_own([parameter], recipe)
    start = tensors.flat()
    for step in range(40):
        ours.sample(step)
        tensors.parameters[0].grad = None
        toy_loss(*toy_parts(tensors.parameters[0]), x, y).backward()
        ours.restore()
        ours.step(step)
        theirs.param_groups[0]["lr"] = 0.02 if step < 30 else 0.005
        torch.manual_seed(draw_seed(5, step))
        with theirs.sampled_params(train=True):
            parameter.grad = None
            toy_loss(*toy_parts(parameter), x, y).backward()
        theirs.step()
        group = theirs.param_groups[0]
        torch.testing.assert_close(tensors.flat(), parameter.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.hessian, group["hess"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.momentum, group["momentum"], rtol=1e-4, atol=1e-6)
    assert (tensors.flat() - start).abs().max() > 0.03
    assert (ours.hessian - 0.1).abs().max() > 0.01


def source_of(folder, member, config=None):
    """A member's adapter as the command hands it to a method."""
    from safetensors.torch import load_file

    state = load_file(folder / member / "adapter_model.safetensors")
    config = json.loads((folder / member / "adapter_config.json").read_text())
    return Source("base", None, (SourceAdapter(member, folder / member, "0" * 64, config, state),))


@pytest.fixture(scope="module")
def trained(folder):
    """An ensemble by each method: two members, two epochs, snapshots every four steps."""
    torch.set_num_threads(1)
    from train_fixtures import quick

    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        return {
            name: train_members(make_recipe(folder, output=str(folder / name), **SETTING, **keys))
            for name, keys in METHOD_KEYS.items()
        }


SETTING = {"epochs": 2, "keep_snapshots": 4, "checkpoint_steps": 3, "dropout": 0.1}


def test_ivons_draws_are_ivon_opts_sampled_params(trained):
    """From the state that training wrote, one seed for both generators."""
    source = source_of(trained["ivon"], "member_01")
    adapter = source.adapters[0]
    state = PosteriorState.read(adapter.folder, "ivon", adapter.state)
    names = sorted(adapter.state)
    parameters = [torch.nn.Parameter(adapter.state[name].clone()) for name in names]
    recipe = make_recipe(trained["ivon"].parent, **IVON)
    theirs = ivons_own(parameters, recipe)
    theirs.param_groups[0]["hess"] = torch.cat([state.tensors[name].flatten() for name in names])
    torch.manual_seed(11)
    with theirs.sampled_params():
        sampled = {name: p.detach().clone() for name, p in zip(names, parameters, strict=True)}
    drawn = METHODS["ivon"].fit(source, None).draw(torch.Generator().manual_seed(11))
    assert drawn.keys() == sampled.keys()
    for name in names:
        torch.testing.assert_close(drawn[name], sampled[name], rtol=1e-5, atol=1e-7)
        assert (drawn[name] - adapter.state[name]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------- BLoB


def test_blobs_divergence_and_its_gradients_are_torchs():
    torch.manual_seed(0)
    M, G = (torch.randn(7, 5).double().requires_grad_() for _ in range(2))
    theirs = kl_divergence(Normal(M, G.square()), Normal(torch.zeros(()).double(), 0.2)).sum()
    torch.testing.assert_close(blob.kl_divergence(M, G, 0.2), theirs)
    theirs.backward()
    for ours, gradient in zip(blob.kl_gradients(M.detach(), G.detach(), 0.2), (M.grad, G.grad), strict=True):
        torch.testing.assert_close(ours, gradient)


def test_a_blob_step_is_autograds_through_the_draw(folder):
    """Ten steps against torch's AdamW on the loss of M + G² ε, then torch's SGD on torch's own divergence."""
    recipe = make_recipe(folder, **BLOB, gradient_clip=None, weight_decay=0.1, blob_kl_learning_rate=0.04)
    tensors, x, y = toy_tensors()
    ours = BlobOptimiser(tensors, recipe, 10, seed=4, documents=30)
    M, B = (torch.nn.Parameter(part.clone()) for part in toy_parts(tensors.flat()))
    G = torch.nn.Parameter(ours.root.detach().clone().view(2, 3))
    start = G.detach().clone()
    assert ((G > 0.3 / 2**0.5) & (G < 0.3)).all()
    groups = [{"params": [M, B], "weight_decay": 0.1}, {"params": [G], "weight_decay": 0.0}]
    adamw, sgd = torch.optim.AdamW(groups, lr=5e-3), torch.optim.SGD([M, G], lr=0.04 / 4)  # 30 documents by 8
    for step in range(10):
        ours.sample(step)
        tensors.parameters[0].grad = None
        toy_loss(*toy_parts(tensors.parameters[0]), x, y).backward()
        ours.restore()
        ours.step(step)
        adamw.zero_grad()
        toy_loss(M + G.square() * ours.noise.view(2, 3), B, x, y).backward()
        adamw.step()
        sgd.zero_grad()
        kl_divergence(Normal(M, G.square()), Normal(0.0, recipe.blob_prior)).sum().backward()
        sgd.step()
    flat = torch.cat([M.detach().flatten(), B.detach().flatten()])
    torch.testing.assert_close(tensors.flat(), flat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.root.detach().view(2, 3), G.detach(), rtol=1e-4, atol=1e-5)
    assert (G - start).abs().max() > 0.01


def test_the_data_alone_move_g_too(folder):
    """Or the comparison above could be of the divergence alone."""
    recipe = make_recipe(folder, **BLOB, blob_kl_learning_rate=1e-12)
    tensors, x, y = toy_tensors()
    ours = BlobOptimiser(tensors, recipe, 10, seed=4, documents=30)
    start = ours.root.detach().clone()
    ours.sample(0)
    toy_loss(*toy_parts(tensors.parameters[0]), x, y).backward()
    ours.restore()
    ours.step(0)
    assert (ours.root.detach() - start).abs().min() > 1e-4


# ------------------------------------------------------------------------------------------- both of them


def toy_posterior(name, tmp_path):
    """A posterior over an A and a B with known means and deviations."""
    torch.manual_seed(2)
    state = {A_NAME: torch.randn(2, 3), B_NAME: torch.randn(4, 2)}
    spread = {key: torch.rand_like(tensor) + 0.2 for key, tensor in state.items()}
    if name == "ivon":
        PosteriorState("ivon", {"ess": 50.0, "weight_decay": 0.1}, spread).write(tmp_path)
        deviation = {key: (50 * (h + 0.1)) ** -0.5 for key, h in spread.items()}
    else:
        PosteriorState("blob", {"prior": 0.2}, {A_NAME: spread[A_NAME]}).write(tmp_path)
        deviation = {A_NAME: spread[A_NAME] ** 2, B_NAME: torch.zeros(4, 2)}
    source = Source("base", None, (SourceAdapter("member_00", tmp_path, "0" * 64, {}, state),))
    return source, deviation


@pytest.mark.parametrize("name", METHOD_KEYS)
def test_draws_have_the_declared_mean_and_covariance(name, tmp_path):
    """Means, variances and correlations of 4000 draws: three chi-square tests, one false alarm in 10,000 each."""
    source, deviation = toy_posterior(name, tmp_path)
    posterior, state = METHODS[name].fit(source, None), source.adapters[0].state
    generator, n = torch.Generator().manual_seed(8), 4000
    draws = [posterior.draw(generator) for _ in range(n)]
    random = [key for key in state if deviation[key].max() > 0]
    z = torch.stack(
        [torch.cat([((d[k] - state[k]) / deviation[k]).flatten() for k in random]) for d in draws]
    ).double()
    dimensions = z.shape[1]
    moments = z.T @ z / n
    off = moments[tuple(np.triu_indices(dimensions, 1))]
    statistics = {
        "mean": (n * z.mean(0).square().sum(), dimensions),
        "variance": (n / 2 * (moments.diagonal() - 1).square().sum(), dimensions),
        "correlation": (n * off.square().sum(), len(off)),
    }
    for what, (value, degrees) in statistics.items():
        assert chi2.sf(float(value), degrees) > FALSE_ALARMS, what
    for key in set(state) - set(random):
        assert all(torch.equal(draw[key], state[key]) for draw in draws[:3])


@pytest.mark.parametrize("name", METHOD_KEYS)
def test_without_spread_a_draw_is_the_adapter(name, tmp_path):
    source, _ = toy_posterior(name, tmp_path)
    adapter = source.adapters[0]
    options = {}
    if name == "ivon":
        options = {"ess": 1e30}
    else:
        PosteriorState("blob", {"prior": 0.2}, {A_NAME: torch.zeros(2, 3)}).write(tmp_path)
    draw = METHODS[name].fit(source, None, **options).draw(torch.Generator().manual_seed(0))
    assert largest_difference(draw, adapter.state) < 1e-12
    assert all(draw[key].data_ptr() != adapter.state[key].data_ptr() for key in draw)


@pytest.mark.parametrize("engine", ["joint", "plain"])
@pytest.mark.parametrize("name", METHOD_KEYS)
def test_a_member_trained_jointly_is_the_member_trained_alone(folder, name, engine):
    """Bit for bit, the spread too; members taking turns change nothing either."""
    settings = {"dropout": 0.2, "lora_l2": 0.01, "epochs": 9, "gradient_accumulation": 2, "batch_size": 4}
    recipe = make_recipe(folder, members=3, engine=engine, **settings, **METHOD_KEYS[name])
    trainer = make_trainer(recipe)
    together = train_steps(trainer, 25)
    turns = make_trainer(
        make_recipe(folder, members=3, engine=engine, members_at_once=2, **settings, **METHOD_KEYS[name])
    )
    for member, other in ((0, make_trainer(recipe, [0])), (2, make_trainer(recipe, [2])), (1, turns)):
        key = f"member_{member:02d}"
        assert largest_difference(together[key], train_steps(other, 25)[key]) == 0.0
        spreads = [t.engine.optimiser(key).posterior().tensors for t in (trainer, other)]
        assert largest_difference(*spreads) == 0.0
    assert largest_difference(together["member_00"], together["member_02"]) > 1e-3


@pytest.mark.parametrize("name", METHOD_KEYS)
def test_both_engines_train_the_same(folder, name):
    trainers = [
        make_trainer(make_recipe(folder, engine=e, epochs=3, **METHOD_KEYS[name])) for e in ("joint", "plain")
    ]
    assert [type(trainer.engine) for trainer in trainers] == [JointEngine, PlainEngine]
    one, other = (train_steps(trainer, 12) for trainer in trainers)
    for key in one:
        assert largest_difference(one[key], other[key]) < 1e-5
        spreads = [trainer.engine.optimiser(key).posterior().tensors for trainer in trainers]
        assert largest_difference(*spreads) < 1e-5


@pytest.mark.parametrize("name", METHOD_KEYS)
def test_gradients_are_taken_at_a_draw_and_the_member_is_its_mean(folder, name, monkeypatch):
    trainer = make_trainer(make_recipe(folder, **METHOD_KEYS[name]))
    engine, seen = trainer.engine, []
    gradients = engine._gradients

    def spy(*arguments):
        seen.append(engine.matrix.values.clone())
        return gradients(*arguments)

    monkeypatch.setattr(engine, "_gradients", spy)
    before = engine.matrix.values.clone()
    engine.step(trainer.order.epoch(1, [0, 1])[0], 0, engine.names)
    assert ((seen[0] - before).abs().amax(1) > 1e-3).all()
    assert (seen[0][0] - before[0] - (seen[0][1] - before[1])).abs().max() > 1e-3  # each member its own noise
    assert (engine.matrix.values - before).abs().max() < 0.5 * (seen[0] - before).abs().max()


@pytest.mark.parametrize("name", METHOD_KEYS)
def test_a_nan_leaves_the_mean(folder, name):
    trainer = make_trainer(make_recipe(folder, **METHOD_KEYS[name]))
    engine = trainer.engine
    with torch.no_grad():
        engine.matrix.values[1, 0] = torch.nan
    before = engine.matrix.values.clone()
    with pytest.raises(EnsembleError, match="the loss of member_01 is nan at step 1; lower learning_rate"):
        engine.step(trainer.order.epoch(1, [0, 1])[0], 0, engine.names)
    torch.testing.assert_close(engine.matrix.values, before, equal_nan=True, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", METHOD_KEYS)
def test_a_folder_holds_mean_and_spread_and_loads_anywhere(trained, folder, name, capsys):
    ensemble = find_ensemble(trained[name])
    assert len(ensemble.members) == 2
    manifest = json.loads((trained[name] / "ensemble.json").read_text())
    for entry in manifest["members"]:
        for place in (entry["folder"], *entry["epochs"].values(), *entry["steps"].values()):
            assert f"{place}/{FILE_NAME}" in entry["files"]
    assert f"lora-ensemble draw {name}" in (trained[name] / "member_00" / "README.md").read_text()
    assert main(["check", str(trained[name])]) == 0
    assert "BROKEN" not in capsys.readouterr().out
    (trained[name] / "member_00" / FILE_NAME).rename(trained[name] / "away")
    assert main(["check", str(trained[name])]) == 2
    (trained[name] / "away").rename(trained[name] / "member_00" / FILE_NAME)


@pytest.mark.parametrize("name", METHOD_KEYS)
@pytest.mark.parametrize("after", [2, 5, 10])
def test_a_stopped_run_ends_with_the_files_of_one_that_was_not(
    trained, folder, tmp_path, monkeypatch, name, after
):
    """Steps 4 and 8 are kept: a stop falls before, between and behind them, behind checkpoints and elsewhere."""
    recipe = make_recipe(folder, output=str(tmp_path / "stopped"), **SETTING, **METHOD_KEYS[name])
    original = JointEngine.step

    def stop(engine, batches, step, active):
        if step == after:
            raise StopError
        return original(engine, batches, step, active)

    with monkeypatch.context() as patch:
        patch.setattr(JointEngine, "step", stop)
        with pytest.raises(StopError):
            train_members(recipe)
    assert contents(train_members(recipe)) == contents(trained[name])


@pytest.mark.parametrize("name", METHOD_KEYS)
def test_the_command_draws_members_that_load_and_say_where_they_are_from(trained, tmp_path, name, capsys):
    output = tmp_path / "drawn"
    words = ["draws_per_member=2", "seed=3", f"output={output}"]
    assert main(["draw", name, str(trained[name]), *words]) == 0
    assert main(["check", str(output)]) == 0
    assert "BROKEN" not in capsys.readouterr().out
    manifest = json.loads((output / "ensemble.json").read_text())
    states = manifest["method"]["settings"]["state"]
    for member in ("member_00", "member_01"):
        assert states[member] == {"file": FILE_NAME, "sha256": sha256(trained[name] / member / FILE_NAME)}
    assert len(manifest["members"]) == 4
    assert len({member.sha256 for member in find_ensemble(output).members}) == 4


def test_the_state_has_equal_bytes_for_equal_numbers(tmp_path):
    tensors = {f"layer_{i}.lora_A.weight": torch.full((2, 2), float(i)) for i in range(9)}
    for place, items in (("one", tensors.items()), ("other", reversed(tensors.items()))):
        (tmp_path / place).mkdir()
        PosteriorState("blob", {"prior": 0.2, "ess": 1.0}, dict(items)).write(tmp_path / place)
    assert (tmp_path / "one" / FILE_NAME).read_bytes() == (tmp_path / "other" / FILE_NAME).read_bytes()


def spoiled(tmp_path, how):
    source, _ = toy_posterior("ivon", tmp_path)
    path, adapter = tmp_path / FILE_NAME, source.adapters[0].state
    good = {key: torch.ones_like(tensor) for key, tensor in adapter.items()}
    settings = {"ess": 50.0, "weight_decay": 0.1}
    if how == "missing":
        path.unlink()
    elif how == "garbage":
        path.write_bytes(b"\x00" * 100)
    elif how == "other method":
        PosteriorState("blob", settings, good).write(tmp_path)
    elif how == "other shape":
        PosteriorState("ivon", settings, {**good, A_NAME: torch.ones(3, 3)}).write(tmp_path)
    elif how == "a layer short":
        PosteriorState("ivon", settings, {A_NAME: good[A_NAME]}).write(tmp_path)
    elif how == "nan":
        PosteriorState("ivon", settings, {**good, A_NAME: torch.full((2, 3), torch.nan)}).write(tmp_path)
    elif how == "negative":
        PosteriorState("ivon", settings, {**good, A_NAME: torch.full((2, 3), -1.0)}).write(tmp_path)
    elif how == "no settings":
        PosteriorState("ivon", {}, good).write(tmp_path)
    return source


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "has no posterior.safetensors, which training with optimizer: ivon leaves beside"),
        ("garbage", "is not readable .*; copy the folder again"),
        ("other method", "is of 'blob', not of ivon; draw with 'blob'"),
        ("other shape", "is of another adapter: .*lora_A.* does not fit"),
        ("a layer short", "no positive variance of every weight"),
        ("nan", "has values that are not finite numbers"),
        ("negative", "no positive variance of every weight"),
        ("no settings", "no positive variance of every weight"),
    ],
)
def test_a_spoiled_state_is_refused_in_one_line(tmp_path, how, message):
    with pytest.raises(EnsembleError, match=message) as caught:
        METHODS["ivon"].fit(spoiled(tmp_path, how), None)
    assert one_line(caught.value) == str(caught.value)


def test_engines_restore_after_any_error(folder):
    trainer = make_trainer(make_recipe(folder, **IVON))
    before = trainer.engine.matrix.values.clone()
    assert isinstance(trainer.engine, Engine)
    with pytest.raises(StopError), trainer.engine.sampling(0, trainer.engine.names):
        assert not torch.equal(trainer.engine.matrix.values, before)
        raise StopError
    assert torch.equal(trainer.engine.matrix.values, before)
