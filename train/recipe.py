"""What a training run is told: one flat YAML file, every key checked, nothing guessed.

A recipe is read from a file (or a bundled recipe's name) and ``key=value`` overrides. Every mistake ends in
one line that names the key, the place and the way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from lm_eval_lora_ensemble.disk import recipes_folder
from lm_eval_lora_ensemble.errors import EnsembleError, nearest
from lm_eval_lora_ensemble.train.recipe_checks import check_together
from lm_eval_lora_ensemble.train.recipe_keys import (
    Rule,
    at_least,
    choice,
    commit,
    course,
    flag,
    fraction,
    integer,
    interval,
    key,
    layer_numbers,
    module_names,
    nonnegative,
    optional,
    positive,
    text,
    texts,
)

FILE_NAME = "recipe.yaml"


@dataclass(frozen=True)
class Recipe:
    """Every key of a training run, checked: its default, the rule its value obeys, and what it means.

    The YAML keys are the attribute names. docs/recipe.md and recipe.schema.json are generated from here.
    """

    base_model: str = key(
        ...,
        text(),
        "Hub id or local folder of the frozen causal language model; smollm2 is the quickstart's.",
        section="What is trained, on what",
    )
    task: tuple[str, ...] = key(
        ..., texts(least=1), "lm-eval multiple-choice tasks on whose training documents the members train."
    )
    revision: str | None = key(
        None, optional(commit()), "Branch, tag or commit of base_model on the Hub; null is main."
    )
    include_path: str | None = key(
        None, optional(text()), "Folder of further task YAMLs, as lm_eval's --include_path."
    )
    num_fewshot: int | None = key(
        None,
        optional(integer(0)),
        "Example documents in front of each document; null is the task's own number.",
    )
    objective: str = key(
        "answer",
        choice("answer", "choices"),
        "A document's loss in nats: answer is -log p(gold continuation), choices is -log of the gold's share "
        "of the softmax over the choices.",
    )
    choice_scores: str = key(
        "sum",
        choice("sum", "chars"),
        "The scores in the softmax of choices: sum is the choices' loglikelihoods, chars divides each by its "
        "characters, as acc_norm does.",
    )
    choice_temperature: float = key(
        1.0, at_least(1e-6), "The fixed τ that the softmax of choices divides its scores by."
    )
    output: str = key("./ensemble", text(), "Folder the ensemble is written to.", operational=True)

    members: int = key(5, integer(1, 1000), "Number of members, each one adapter.", section="The ensemble")
    seed: int = key(0, integer(0), "Member i has seed + i: initial weights, order of the documents, dropout.")
    initial_adapters: tuple[str, ...] = key(
        (),
        texts(),
        "Adapter folders to start from instead of fresh weights: one ensemble, one adapter for all members, "
        "or one for each.",
    )

    rank: int = key(8, integer(1), "Rank r of the update B·A.", section="The adapter")
    alpha: float = key(16.0, positive(), "The update is scaled by alpha / rank.")
    rslora: bool = key(False, flag(), "Scale the update by alpha / √rank instead (rank-stabilised LoRA).")
    dora: bool = key(
        False, flag(), "Train magnitudes beside the update (DoRA); the members then train one after another."
    )
    dropout: float = key(0.0, fraction(), "Probability of dropping each input of A while training.")
    target_modules: str | tuple[str, ...] = key(
        ("q_proj", "v_proj"),
        module_names(),
        "Modules to adapt, by the last part of their names; all-linear is every linear layer but the head.",
    )
    layers: tuple[int, ...] | None = key(
        None,
        optional(layer_numbers()),
        "Decoder layers to adapt, counted from 0, a range's ends included; null is all.",
    )

    optimizer: str = key(
        "adamw",
        choice("adamw", "ivon"),
        "adamw, or ivon: AdamW's cost, and a Gaussian over A and B, which lora-ensemble draw ivon draws from.",
        section="The optimiser",
    )
    learning_rate: float = key(
        2e-4,
        positive(),
        "The learning rate after the warm-up; IVON's is larger, 0.03 in the literature on LoRA.",
    )
    schedule: str = key(
        "constant",
        choice("constant", "linear", "cosine"),
        "Course of the learning rate after the warm-up; linear and cosine fall to 0 at the last step.",
    )
    swa_start: float | None = key(
        None,
        optional(course()),
        "Where the course of the learning rate ends and swa_learning_rate begins, after that share of the run or so "
        "many steps; null nowhere.",
    )
    swa_learning_rate: float | None = key(
        None,
        optional(positive()),
        "The constant learning rate from swa_start on; null is learning_rate.",
    )
    warmup_steps: int = key(0, integer(0), "Optimiser steps in which the learning rate rises linearly.")
    weight_decay: float = key(
        0.0,
        nonnegative(),
        "AdamW's decoupled weight decay of A and B; IVON's δ, a prior precision of ivon_ess · δ.",
    )
    lora_l2: float = key(
        0.0, nonnegative(), "λ of the penalty λ Σ‖B·A‖²_F over the layers, in nats, without alpha / rank."
    )
    lora_b_l2: float = key(0.0, nonnegative(), "λ of the penalty λ Σ‖B‖²_F over the layers, in nats.")
    gradient_clip: float | None = key(
        1.0, optional(positive()), "Largest norm of a member's gradient at a step; null does not clip."
    )

    ivon_ess: float = key(
        1e7,
        positive(),
        "Effective sample size: the posterior's variance is 1 / (ivon_ess · (h + weight_decay)), h the Hessian's "
        "estimate.",
        section="A posterior over the weights",
    )
    ivon_hess_init: float = key(1e-3, positive(), "The Hessian's estimate before the first step.")
    ivon_beta1: float = key(0.9, fraction(), "Share of the gradient's running mean that a step keeps.")
    ivon_beta2: float = key(0.99999, fraction(), "Share of the Hessian's running mean that a step keeps.")
    ivon_clip_radius: float | None = key(
        1e-3,
        optional(positive()),
        "Largest element of IVON's preconditioned gradient, before the learning rate; null does not clip.",
    )
    posterior: str = key(
        "none",
        choice("none", "blob"),
        "blob trains a Gaussian over A by AdamW, which lora-ensemble draw blob draws from; none trains a point.",
    )
    blob_epsilon: float = key(
        0.05, positive(), "G begins between ε/√2 and ε; the standard deviation of A's elements is G²."
    )
    blob_prior: float = key(0.2, positive(), "Standard deviation of A's elements under the prior.")
    blob_kl_learning_rate: float = key(
        0.01,
        positive(),
        "Rate of the gradient descent on the divergence from the prior over one epoch's steps; follows the course "
        "of learning_rate.",
    )

    epochs: int = key(
        1,
        integer(1),
        "Passes over the training documents; an adapter is kept after each.",
        section="How long",
    )
    max_steps: int | None = key(
        None,
        optional(integer(1)),
        "Optimiser steps after which the run ends at the latest; null sets no bound.",
    )
    early_stopping: int | None = key(
        None,
        optional(integer(1)),
        "Epochs without a lower validation NLL after which a member ends with its best epoch; null never.",
    )

    keep_snapshots: int | str = key(
        "epoch",
        interval(),
        "Adapters kept on the way: after each epoch, or besides after every N steps from swa_start on.",
    )

    batch_size: int = key(8, integer(1), "Documents of each member in a forward pass.", section="The data")
    gradient_accumulation: int = key(1, integer(1), "Batches of an optimiser step.")
    max_length: int | None = key(
        None, optional(integer(2)), "Longest sequence in tokens; null is the base model's own limit."
    )
    truncate: str = key(
        "refuse",
        choice("refuse", "left"),
        "What becomes of a longer document: the run is refused, or its context is cut from the left; "
        "an answer never is.",
    )
    train_limit: int | None = key(
        None, optional(integer(1)), "Training documents used of each task; null uses all."
    )
    validation_limit: int | None = key(
        None, optional(integer(0)), "Validation documents measured of each task; null measures all, 0 none."
    )
    subset_seed: int | None = key(
        None, optional(integer(0)), "Draws the documents within the limits; null takes the first ones."
    )
    shuffle: bool = key(
        True,
        flag(),
        "Every member sees the documents in its own order, new each epoch; false is the task's order.",
    )
    length_groups: bool = key(
        True,
        flag(),
        "A batch holds documents of about one length in tokens, which saves padding; needs shuffle.",
    )

    dtype: str = key(
        "auto",
        choice("auto", "float32", "bfloat16", "float16"),
        "Type of the base's weights; auto is bfloat16 where the hardware multiplies it, else float32. "
        "Adapters are float32.",
        section="The machine",
    )
    quantization: str = key(
        "none",
        choice("none", "4bit", "8bit"),
        "Bits of the base's weights by bitsandbytes (4bit is NF4); the members then train one after another.",
    )
    gradient_checkpointing: bool = key(
        False,
        flag(),
        "Compute activations again in the backward pass instead of keeping them: less memory, more time.",
    )
    engine: str = key(
        "auto",
        choice("auto", "joint", "plain"),
        "joint trains the members in one batch, plain one after another; auto is joint wherever that works.",
    )
    members_at_once: int | None = key(
        None,
        optional(integer(1)),
        "Members that share a forward pass, at the same result (on a GPU up to rounding); null is as many as keep the "
        "hardware busy.",
        operational=True,
    )
    device: str = key(
        "auto",
        text(),
        "torch device: cpu, cuda, cuda:1, mps; auto is the process's own under accelerate.",
        operational=True,
    )

    checkpoint_steps: int | None = key(
        100,
        optional(integer(1)),
        "Optimiser steps from one checkpoint to the next; null keeps one an epoch.",
        section="Seen from outside",
        operational=True,
    )
    keep_checkpoints: int = key(2, integer(1), "Checkpoints kept of each member.", operational=True)
    report_to: tuple[str, ...] = key(
        (),
        texts(),
        "Trackers of accelerate that losses in nats are sent to: tensorboard, wandb, mlflow …",
        operational=True,
    )

    @classmethod
    def load(cls, source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe file, or the bundled recipe of that name, and apply ``key=value`` overrides.

        Raises:
            EnsembleError: no such recipe, no YAML mapping, an unknown key, or a value out of its range.
        """
        path = find(source)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise EnsembleError(
                f"recipe {path} cannot be read: {error}; it must be a YAML file of key: value lines"
            ) from error
        if not isinstance(values, dict):
            raise EnsembleError(
                f"recipe {path} holds no key: value lines; see the recipes in {recipes_folder()}"
            )
        return cls.from_mapping({**values, **parse_overrides(overrides)}, where=str(path))

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any], where: str = "recipe") -> Recipe:
        """Check ``values`` and build the recipe; ``where`` names their source in errors."""
        for name in values:
            if name not in RULES:
                raise EnsembleError(f"{where}: unknown key {name!r}; {_known(str(name))}")
        for name in REQUIRED:
            if values.get(name) in (None, "", []):
                raise EnsembleError(f"{where}: no {name}; add a line '{name}: …' or give {name}=…")
        recipe = cls(**{name: _checked(name, value, where) for name, value in values.items()})
        check_together(asdict(recipe), DEFAULTS, where)
        return recipe

    def as_mapping(self, *, operational: bool = True) -> dict[str, Any]:
        """Return the keys and values in plain YAML types, with or without the operational ones."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if operational or name not in OPERATIONAL
        }

    def as_yaml(self, *, operational: bool = True) -> str:
        """Return the resolved recipe as YAML text that :meth:`load` reads back."""
        return yaml.safe_dump(self.as_mapping(operational=operational), sort_keys=False, allow_unicode=True)

    def differences(self, other: Recipe) -> list[str]:
        """Return the keys on which two recipes would compute different members."""
        own, others = self.as_mapping(operational=False), other.as_mapping(operational=False)
        return [name for name, value in own.items() if value != others[name]]

    @property
    def scaling(self) -> float:
        """The factor of B·A: alpha / rank, or alpha / √rank for rank-stabilised LoRA."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    @property
    def variational(self) -> str | None:
        """The method that trains a distribution over the weights, ``ivon`` or ``blob``; None for a point."""
        if self.optimizer == "ivon":
            return "ivon"
        return self.posterior if self.posterior != "none" else None


RULES: dict[str, Rule] = {field.name: field.metadata["rule"] for field in fields(Recipe)}
REQUIRED = tuple(field.name for field in fields(Recipe) if field.default is MISSING)
DEFAULTS = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}
OPERATIONAL = frozenset(field.name for field in fields(Recipe) if field.metadata["operational"])
"""Keys that say how a run is carried out, not what it computes: they may change when a run is resumed."""


def find(source: str | Path) -> Path:
    """Return the path of a recipe given as a file or as a bundled recipe's name."""
    path = Path(source)
    if path.is_file():
        return path
    bundled = {recipe.stem: recipe for recipe in sorted(recipes_folder().glob("*.yaml"))}
    name = path.name.removesuffix(".yaml")
    if name in bundled and path.parent == Path():
        return bundled[name]
    raise EnsembleError(
        f"no recipe {str(source)!r}: neither a file nor a bundled recipe ({', '.join(bundled)})"
    )


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Parse ``key=value`` words; values are read as YAML."""
    values: dict[str, Any] = {}
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            raise EnsembleError(f"{word!r} is no override; write key=value, for example members=3")
        try:
            values[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise EnsembleError(f"the value of override {word!r} is not YAML; quote it") from error
    return values


def _known(name: str) -> str:
    """Say which key was probably meant."""
    near = nearest(name, RULES)
    return f"did you mean {near!r}?" if near else f"known keys: {', '.join(RULES)}"


def _checked(name: str, value: Any, where: str) -> Any:
    rule = RULES[name]
    try:
        return rule.convert(value)
    except (ValueError, TypeError, OverflowError):
        raise EnsembleError(f"{where}: {name} is {value!r}, it must be {rule.expectation}") from None
