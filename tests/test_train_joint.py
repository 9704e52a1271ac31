"""The joint step: every member is what it would be alone, and what PEFT would make of it."""

import sys
import warnings

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from train_fixtures import (  # noqa: F401
    largest_difference,
    make_model,
    make_recipe,
    make_trainer,
    one_thread,
    quick_tasks,
    train_steps,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.train import adapters, base
from lm_eval_lora_ensemble.train.engine import checkpoint_layers
from lm_eval_lora_ensemble.train.joint import JointEngine
from lm_eval_lora_ensemble.train.plain import PlainEngine

SETTINGS = {
    "choices": {"objective": "choices"},
    "answer": {"objective": "answer"},
    "by characters": {"choice_scores": "chars", "choice_temperature": 0.2},
    "accumulation": {"gradient_accumulation": 3, "batch_size": 4},
    "all-linear, rsLoRA, layer 1": {"target_modules": "all-linear", "rslora": True, "layers": [1]},
    "checkpointing": {"gradient_checkpointing": True},
    "data set's order": {"shuffle": False},
    "no length groups": {"length_groups": False},
    "schedule": {"schedule": "cosine", "warmup_steps": 5, "weight_decay": 0.1, "gradient_clip": None},
    "head": {"target_modules": ["q_proj", "v_proj", "lm_head"], "objective": "answer", "batch_size": 4},
    "head, choices": {"target_modules": ["v_proj", "lm_head"], "gradient_accumulation": 2},
    "head alone": {"target_modules": ["lm_head"]},
    "head, checkpointing": {"target_modules": ["q_proj", "lm_head"], "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    make_recipe(folder)
    make_model(folder / "untied", tie_word_embeddings=False)
    return folder


def settings_of(folder, setting):
    """The setting's keys; an adapted head needs a base that has a head of its own."""
    settings = SETTINGS[setting]
    untied = {"base_model": str(folder / "untied")} if setting.startswith("head") else {}
    return {**settings, **untied}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_member_trained_jointly_is_the_member_trained_alone(folder, setting):
    """Dropout and both penalties on, bit for bit; fifty steps for each objective, fewer for the other knobs."""
    steps = 50 if setting in {"choices", "answer", "head"} else 12
    recipe = make_recipe(
        folder,
        members=3,
        epochs=20,
        dropout=0.2,
        lora_l2=0.01,
        lora_b_l2=0.001,
        **settings_of(folder, setting),
    )
    together = train_steps(make_trainer(recipe), steps)
    for member in (0, 2):
        name = f"member_{member:02d}"
        alone = train_steps(make_trainer(recipe, [member]), steps)
        assert largest_difference(together[name], alone[name]) == 0.0
    assert largest_difference(together["member_00"], together["member_02"]) > 1e-3


def test_members_bring_different_numbers_of_positions_to_the_head(folder):
    """Or the comparisons above would prove nothing about them."""
    for setting in ("head", "head, choices"):
        trainer = make_trainer(make_recipe(folder, members=3, **settings_of(folder, setting)))
        assert isinstance(trainer.engine, JointEngine)
        parts = [part for batches in trainer.order.epoch(1, [0, 1, 2]) for part in batches]
        batches = [trainer.layout.batch(part.documents, part.length, trainer.engine.device) for part in parts]
        shares = [batch.scored_per_member() for batch in batches]
        assert any(len(set(of_members)) > 1 for of_members in shares)
        for batch, of_members in zip(batches, shares, strict=True):
            ends = torch.tensor(of_members).cumsum(0)
            for member, end in enumerate(ends.tolist()):
                used = batch.output[member][batch.weight[member] > 0]
                assert used.min() == end - of_members[member]
                assert used.max() == end - 1


@pytest.mark.parametrize("setting", ["choices", "head"])
def test_members_at_once_trades_memory_and_changes_nothing(folder, setting):
    recipe = make_recipe(folder, members=5, dropout=0.1, **settings_of(folder, setting))
    halves = make_recipe(folder, members=5, dropout=0.1, members_at_once=2, **settings_of(folder, setting))
    one, other = train_steps(make_trainer(recipe), 5), train_steps(make_trainer(halves), 5)
    assert all(largest_difference(one[name], other[name]) == 0.0 for name in one)


def test_initial_weights_are_those_of_peft_alone(folder):
    recipe = make_recipe(folder, members=3, seed=40)
    trainer = make_trainer(recipe)
    for i, name in enumerate(trainer.members):
        model = AutoModelForCausalLM.from_pretrained(recipe.base_model)
        torch.manual_seed(40 + i)
        alone = get_peft_model(model, adapters.lora_config(recipe, trainer.base))
        assert largest_difference(trainer.engine.weights(name), get_peft_model_state_dict(alone)) == 0.0


@pytest.mark.parametrize("setting", ["answer", "choices", "head", "head, choices", "by characters"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_joint_step_is_pefts(folder, setting, dtype):
    """Both engines compute the same gradients, in PEFT's own precision of base and adapters."""
    settings = {"dtype": dtype, "lora_l2": 0.02, "lora_b_l2": 0.01, "alpha": 32}
    settings |= settings_of(folder, setting)
    joint = make_trainer(make_recipe(folder, **settings))
    plain = make_trainer(make_recipe(folder, engine="plain", **settings))
    assert isinstance(joint.engine, JointEngine)
    assert isinstance(plain.engine, PlainEngine)
    one, other = train_steps(joint, 4), train_steps(plain, 4)
    tolerance = 2e-5 if dtype == "float32" else 4 * 5e-3
    assert all(largest_difference(one[name], other[name]) < tolerance for name in one)


def test_losses_and_penalty_gradients_are_autograds(folder):
    recipe = make_recipe(folder, lora_l2=0.3, lora_b_l2=0.2, members=2, objective="answer")
    trainer = make_trainer(recipe)
    train_steps(trainer, 2)  # away from B = 0
    engine = trainer.engine
    engine.matrix.gradients.zero_()
    engine._add_penalty_gradients()
    for layer in engine.stacked.values():
        A, B = (w.detach().double().requires_grad_() for w in (layer.A, layer.B))
        penalty = 0.3 * torch.linalg.matrix_norm(B @ A).square().sum() + 0.2 * B.square().sum()
        penalty.backward()
        torch.testing.assert_close(layer.A.grad.double(), A.grad, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(layer.B.grad.double(), B.grad, atol=1e-6, rtol=1e-5)


def test_the_layers_gradient_is_right(folder):
    """Against finite differences in float64, dropout on."""
    from lm_eval_lora_ensemble.train.stacked import _AddLoRA

    x, A, B = (torch.randn(2, 3, 5), torch.randn(2, 2, 5), torch.randn(2, 4, 2))
    x, A, B = (t.double().requires_grad_() for t in (x, A, B))
    y = torch.randn(2, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, x, A, B: _AddLoRA.apply(y.clone(), x, A, B, 1.7, 0.4, [11, 12]), (y, x, A, B)
    )


def test_the_heads_gradient_is_right(folder):
    """The same for members with different numbers of rows; each one's output is its own."""
    from lm_eval_lora_ensemble.train.stacked import _AddLoRA, _AddLoRAToShares

    x, A, B = (torch.randn(1, 5, 4), torch.randn(3, 2, 4), torch.randn(3, 6, 2))
    x, A, B = (t.double().requires_grad_() for t in (x, A, B))
    y = torch.randn(1, 5, 6).double().requires_grad_()
    shares, seeds = [2, 1, 2], [11, 12, 13]
    assert torch.autograd.gradcheck(
        lambda y, x, A, B: _AddLoRAToShares.apply(y.clone(), x, A, B, 1.7, 0.4, seeds, shares), (y, x, A, B)
    )
    together = _AddLoRAToShares.apply(y.clone(), x, A, B, 1.7, 0.4, seeds, shares)
    alone = _AddLoRA.apply(y[:, 2:3].clone(), x[:, 2:3], A[1:2], B[1:2], 1.7, 0.4, seeds[1:2])
    torch.testing.assert_close(together[:, 2:3], alone, rtol=0, atol=0)


def test_inactive_members_are_left_alone(folder):
    trainer = make_trainer(make_recipe(folder, members=3, dropout=0.1, weight_decay=0.1))
    engine = trainer.engine
    batches = trainer.order.epoch(1, [0, 1, 2])
    engine.step(batches[0], 0, engine.names)
    before = {name: {k: v.clone() for k, v in engine.weights(name).items()} for name in engine.names}
    losses = engine.step(batches[1], 1, ["member_00", "member_02"])
    assert list(losses) == ["member_00", "member_02"]
    moved = {name: largest_difference(before[name], engine.weights(name)) for name in engine.names}
    assert moved["member_01"] == 0.0
    assert moved["member_00"] > 0
    assert moved["member_02"] > 0


def test_a_nan_names_member_and_step_and_changes_no_one(folder):
    trainer = make_trainer(make_recipe(folder, members=2))
    engine = trainer.engine
    batches = trainer.order.epoch(1, [0, 1])
    engine.step(batches[0], 0, engine.names)
    with torch.no_grad():
        engine.matrix.values[1, 0] = torch.nan
    before = engine.matrix.values.clone()
    with pytest.raises(EnsembleError, match="the loss of member_01 is nan at step 2; lower learning_rate"):
        engine.step(batches[1], 1, engine.names)
    torch.testing.assert_close(engine.matrix.values, before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("setting", ["choices", "all-linear, rsLoRA, layer 1", "head"])
def test_an_exported_adapter_is_the_trained_member(folder, tmp_path, setting):
    trainer = make_trainer(make_recipe(folder, members=2, **settings_of(folder, setting)))
    train_steps(trainer, 6)
    ids = torch.randint(2, 300, (3, 17))
    for i, name in enumerate(trainer.members):
        target = tmp_path / setting[:3] / name
        target.mkdir(parents=True)
        adapters.save(
            target, weights=trainer.engine.weights(name), config=trainer.config[name], card="", recipe_yaml=""
        )
        fresh = AutoModelForCausalLM.from_pretrained(trainer.recipe.base_model)
        peft = PeftModel.from_pretrained(fresh, target).eval()
        with torch.no_grad(), trainer.engine.lineup.scoring([i]):
            torch.testing.assert_close(peft(ids).logits, trainer.base.model(ids).logits, atol=1e-5, rtol=0)


def test_gradient_checkpointing_really_recomputes(folder):
    counts = []
    for checkpointing in (False, True):
        trainer = make_trainer(make_recipe(folder, gradient_checkpointing=checkpointing, dropout=0.1))
        layer, calls = next(iter(trainer.engine.stacked.values())), []
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.engine.step(trainer.order.epoch(1, [0, 1])[0], 0, trainer.engine.names)
        counts.append(len(calls))
    assert counts == [1, 2]


def test_gradient_checkpointing_lasts_where_members_take_turns(folder):
    """In transformers a layer recomputes in train mode only, and measuring must not end it."""
    counts = []
    for checkpointing in (False, True):
        trainer = make_trainer(make_recipe(folder, engine="plain", gradient_checkpointing=checkpointing))
        calls: list[int] = []
        layer = next(iter(adapters.lora_layers(trainer.engine.model).values()))
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        batches = trainer.order.epoch(1, [0, 1])
        for step in range(2):
            trainer.engine.step(batches[step], step, trainer.engine.names)
            trainer.engine.loglikelihoods(
                trainer.layout, [0], max(trainer.layout.lengths()), trainer.engine.names
            )
        counts.append(len(calls))
    measured = 2 * len(trainer.engine.names)
    assert counts[1] - measured == 2 * (counts[0] - measured)


class OlderLlama(LlamaForCausalLM):
    """What transformers before 5.24 offers: the old name alone."""

    activation_checkpointing_enable = property()  # no getter: as if it were not there

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        self._activation_checkpointing_enable(gradient_checkpointing_kwargs)


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, OlderLlama])
def test_layers_are_checkpointed_under_either_name(model_class):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model = model_class(LlamaConfig(vocab_size=8, num_hidden_layers=2, **sizes)).eval()
    checkpoint_layers(model)
    assert model.is_activation_checkpointing
    assert all(layer.training and not layer.self_attn.training for layer in model.model.layers)
    assert not model.lm_head.training


def test_adapters_are_attached_without_a_warning_that_is_others_to_mend(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        make_trainer(make_recipe(folder, gradient_checkpointing=True))


def test_what_cannot_be_stacked_trains_in_turn(folder):
    trainer = make_trainer(make_recipe(folder, dora=True))
    assert isinstance(trainer.engine, PlainEngine)
    weights = train_steps(trainer, 2)
    assert any("magnitude" in key for key in weights["member_00"])
    with pytest.raises(EnsembleError, match="engine=joint cannot train this recipe: DoRA"):
        make_trainer(make_recipe(folder, dora=True, engine="joint"))


@pytest.mark.parametrize("engine", ["joint", "plain"])
def test_adapted_heads_are_saved_without_the_vocabulary_and_score_as_in_hf(folder, tmp_path, engine):
    recipe = make_recipe(folder, engine=engine, learning_rate=0.05, epochs=20, **settings_of(folder, "head"))
    trainer = make_trainer(recipe)
    weights = train_steps(trainer, 12)
    for name in trainer.members:
        assert all(".lora_A." in key or ".lora_B." in key for key in weights[name])
        assert weights[name]["base_model.model.lm_head.lora_B.weight"].abs().max() > 0.01
        (tmp_path / name).mkdir()
        config = trainer.config[name]
        adapters.save(tmp_path / name, weights=weights[name], config=config, card="", recipe_yaml="")
    arguments = [("Question: What colour is the leaf?\nAnswer:", f" {c}") for c in ("green", "dark orange")]
    requests = [Instance("loglikelihood", {}, pair, i, ("", 0, 1)) for i, pair in enumerate(arguments)]
    ours = LoraEnsembleLM(adapters=str(tmp_path), device="cpu").loglikelihood(requests, disable_tqdm=True)
    for i, name in enumerate(trainer.members):
        hf = HFLM(pretrained=recipe.base_model, peft=str(tmp_path / name), device="cpu", batch_size=1)
        theirs = [value for value, _ in hf.loglikelihood(requests, disable_tqdm=True)]
        assert [value.members[i] for value, _ in ours] == pytest.approx(theirs, abs=1e-4)
    assert abs(ours[0][0].members[0] - ours[0][0].members[1]) > 1e-3


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize("modules", [["q_proj", "lm_head"], ["embed_tokens"]])
def test_a_head_tied_to_the_embedding_is_not_adapted(folder, engine, modules):
    """lm-eval's own hf dies of a KeyError on such adapters."""
    with pytest.raises(
        EnsembleError, match=r"share their weights.*cannot score such adapters; leave lm_head"
    ):
        make_trainer(make_recipe(folder, target_modules=modules, engine=engine))
    assert not (folder / "ensemble").exists()


def test_plain_members_are_what_they_would_be_alone(folder):
    recipe = make_recipe(folder, members=2, engine="plain", dropout=0.2, gradient_accumulation=2)
    together = train_steps(make_trainer(recipe), 4)
    alone = train_steps(make_trainer(recipe, [1]), 4)
    assert largest_difference(together["member_01"], alone["member_01"]) == 0.0


def test_unknown_target_modules_are_refused_with_the_known_ones(folder):
    with pytest.raises(EnsembleError, match=r"target_modules .* its linear layers are called .*q_proj"):
        make_trainer(make_recipe(folder, target_modules=["query"]))


def test_an_unloadable_base_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(EnsembleError, match=r"base_model .* cannot be loaded"):
        base.load(make_recipe(folder, base_model=str(tmp_path)), base.pick_device("cpu"))
    with pytest.raises(EnsembleError, match="device 'warp' is unknown to torch"):
        base.pick_device("warp")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    with pytest.raises(EnsembleError, match="quantization=4bit needs bitsandbytes"):
        base.load(make_recipe(folder, quantization="4bit"), base.pick_device("cpu"))
