"""The joint training step as a benchmark takes it: random documents, every member its own batch.

``Joint`` and ``layout_of`` touch the package's training internals, as little as can be: they run in every checkout
since 0.1.0.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peak import linear_shapes, weights
from shapes import SHAPES
from transformers import AutoModelForCausalLM

from lm_eval_lora_ensemble.train.adapters import attach
from lm_eval_lora_ensemble.train.base import Base
from lm_eval_lora_ensemble.train.examples import Choice, Example
from lm_eval_lora_ensemble.train.joint import JointEngine
from lm_eval_lora_ensemble.train.order import MicroBatch
from lm_eval_lora_ensemble.train.recipe import Recipe

CHOICES = 4
CHOICE_TOKENS = 6


def documents(options: Namespace) -> list[Example]:
    """Random documents: a choice's row has ``--length`` tokens, its answer one token or a few."""
    generator = np.random.default_rng(0)
    answer = 1 if options.objective == "answer" else CHOICE_TOKENS
    examples = []
    for i in range(2 * options.documents):
        context = tuple(int(t) for t in generator.integers(2, 900, options.length + 1 - answer))
        choices = tuple(
            Choice(context, tuple(int(t) for t in generator.integers(2, 900, answer))) for _ in range(CHOICES)
        )
        examples.append(Example("random", i, choices, (i % CHOICES,)))
    return examples


def batches(options: Namespace, step: int) -> list[list[int]]:
    """The documents of every member at a step."""
    return [
        [int(d) for d in np.random.default_rng([step, m]).permutation(2 * options.documents)][
            : options.documents
        ]
        for m in range(options.members)
    ]


def recipe_of(options: Namespace) -> Recipe:
    """The settings both ways share."""
    return Recipe.from_mapping(
        {
            "base_model": "benchmark",
            "task": "random",
            "members": options.members,
            "objective": options.objective,
            "alpha": 32,
            "learning_rate": 5e-4,
            "gradient_clip": 1.0,
            "members_at_once": options.members_at_once,
            "gradient_checkpointing": options.gradient_checkpointing,
        }
    )


def base_model(options: Namespace) -> Base:
    """Load or make the frozen model; ``options.dtype`` is a name torch has."""
    dtype = getattr(torch, options.dtype)
    if options.base_model:
        model = AutoModelForCausalLM.from_pretrained(options.base_model, dtype=dtype)
    else:
        torch.manual_seed(0)
        with torch.device(options.device):
            model = AutoModelForCausalLM.from_config(SHAPES[options.shape], dtype=dtype)
    model = model.to(options.device).eval().requires_grad_(requires_grad=False)
    return Base(model, SimpleNamespace(), model.name_or_path, 10**9)


def layout_of(options: Namespace, base: Base, examples: list[Example]) -> Any:
    """Return the rows of the documents, as the checkout at hand lays them out."""
    from lm_eval_lora_ensemble.train import layout

    gold_only = options.objective == "answer"
    if hasattr(layout, "use_tree_rows"):  # 0.1.0
        use_tree = layout.use_tree_rows(base.model, examples)
        return layout.Layout(examples, gold_only=gold_only, use_tree=use_tree)
    from lm_eval_lora_ensemble.train.tree import why_no_tree_rows

    return layout.Layout(
        examples,
        gold_only=gold_only,
        use_tree=why_no_tree_rows(base, examples) is None,
        dtype=base.model.dtype,
    )


class Joint:
    """All members in this package's joint step.

    Attributes:
        tokens: token positions of the last counted step, padding included.
        flops: operations of that step in linear layers and head.
    """

    def __init__(self, options: Namespace, base: Base) -> None:
        recipe, examples = recipe_of(options), documents(options)
        self.options = options
        self.model = base.model
        self.dtype = base.model.dtype
        self.layer_weights = weights(linear_shapes(base.model))
        layout = layout_of(options, base, examples)
        self.length = max(layout.lengths())
        self.names = [f"member_{m:02d}" for m in range(options.members)]
        members = {name: m for m, name in enumerate(self.names)}
        self.engine = JointEngine(attach(base, recipe, members), members, recipe, layout, 10**6)

    def step(self, step: int) -> list[float]:
        """Take one step of every member and return their losses."""
        losses = self.engine.step(
            [MicroBatch(batches(self.options, step), self.length)], step, self.engine.names
        )
        return [losses[name] for name in self.names]

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what a step computes, by watching what enters the model and its head."""
        counts = {"tokens": 0, "head rows": 0}

        def embedded(_: Any, __: Any, hidden: torch.Tensor) -> None:
            counts["tokens"] += hidden.shape[:-1].numel()

        def projected(_: Any, __: Any, logits: torch.Tensor) -> None:
            counts["head rows"] += logits.shape[:-1].numel()

        head = self.model.get_output_embeddings()
        hooks = [
            self.model.get_input_embeddings().register_forward_hook(embedded),
            head.register_forward_hook(projected),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.tokens = counts["tokens"]
        # Two operations a weight and token forward, two for the input's gradient, none for frozen weights.
        self.flops = 4.0 * (self.layer_weights * self.tokens + head.weight.numel() * counts["head rows"])

    def flat_weights(self) -> npt.NDArray[np.float64]:
        """Return all members' weights as one vector, ordered by name."""
        parts = []
        for name in self.names:
            own = self.engine.weights(name)
            parts += [own[key].double().flatten().cpu().numpy() for key in sorted(own)]
        return np.concatenate(parts)
