"""The joint step: every member is what it would be alone, and what PEFT would make of it."""

import sys
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from train_fixtures import (  # noqa: F401
    largest_difference,
    make_recipe,
    make_trainer,
    one_thread,
    quick_tasks,
    train_steps,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lm_eval_lora_ensemble.errors import EnsembleError
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
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    make_recipe(folder)
    return folder


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_member_trained_jointly_is_the_member_trained_alone(folder, setting):
    """Dropout and both penalties on, bit for bit; fifty steps for each objective, fewer for the other knobs."""
    steps = 50 if setting in {"choices", "answer"} else 12
    recipe = make_recipe(
        folder, members=3, epochs=20, dropout=0.2, lora_l2=0.01, lora_b_l2=0.001, **SETTINGS[setting]
    )
    together = train_steps(make_trainer(recipe), steps)
    for member in (0, 2):
        name = f"member_{member:02d}"
        alone = train_steps(make_trainer(recipe, [member]), steps)
        assert largest_difference(together[name], alone[name]) == 0.0
    assert largest_difference(together["member_00"], together["member_02"]) > 1e-3


def test_members_at_once_trades_memory_and_changes_nothing(folder):
    recipe = make_recipe(folder, members=5, dropout=0.1)
    halves = make_recipe(folder, members=5, dropout=0.1, members_at_once=2)
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


@pytest.mark.parametrize("objective", ["answer", "choices", "by characters"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_joint_step_is_pefts(folder, objective, dtype):
    """Both engines compute the same gradients, in PEFT's own precision of base and adapters."""
    settings = SETTINGS[objective] | {"dtype": dtype, "lora_l2": 0.02, "lora_b_l2": 0.01, "alpha": 32}
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


@pytest.mark.parametrize("setting", ["choices", "all-linear, rsLoRA, layer 1"])
def test_an_exported_adapter_is_the_trained_member(folder, tmp_path, setting):
    trainer = make_trainer(make_recipe(folder, members=2, **SETTINGS[setting]))
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
    head = make_trainer(make_recipe(folder, target_modules=["q_proj", "lm_head"]))
    assert isinstance(head.engine, PlainEngine)
    with pytest.raises(EnsembleError, match="engine=joint cannot train this recipe: DoRA"):
        make_trainer(make_recipe(folder, dora=True, engine="joint"))


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
