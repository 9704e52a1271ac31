"""N members trained jointly against N single PEFT runs on the same batches.

The single runs are what a user would write: ``get_peft_model``, the model's own forward pass, AdamW. Joint
and single steps alternate in one process over the same frozen weights, so both see the same machine. Peak
memory is measured in a process each.

    python benchmarks/training.py                                # the SmolLM2-135M shape on this machine
    python benchmarks/training.py --objective choices --documents 4
    python benchmarks/training.py --base-model smollm2           # the real weights
    python benchmarks/training.py --shape mistral-7b --length 128 --device cuda          # the paper's batch
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from memory import peak_bytes
from shapes import SHAPES
from transformers import AutoModelForCausalLM

from lm_eval_lora_ensemble.precision import fast_dtype
from lm_eval_lora_ensemble.train.adapters import attach, lora_config
from lm_eval_lora_ensemble.train.base import Base, resolve_name
from lm_eval_lora_ensemble.train.examples import Choice, Example
from lm_eval_lora_ensemble.train.joint import JointEngine
from lm_eval_lora_ensemble.train.layout import Layout, chain, use_tree_rows
from lm_eval_lora_ensemble.train.order import MicroBatch
from lm_eval_lora_ensemble.train.recipe import Recipe

CHOICES = 4
CHOICE_TOKENS = 6


def main() -> None:
    """Print the comparison as JSON."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    if arguments.only:
        print(json.dumps(measure_memory(arguments)))
        return
    report = compare(arguments)
    if not arguments.no_memory:
        report |= memory_of_each(sys.argv[1:])
    print(json.dumps(report, indent=2))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--base-model", help="real weights: a Hub id, a folder, or smollm2")
    parser.add_argument(
        "--random-weights", action="store_true", help="the default unless --base-model is given"
    )
    parser.add_argument("--objective", choices=("answer", "choices"), default="answer")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--documents", type=int, default=8, help="documents a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens of the longest row of one choice")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not")
    parser.add_argument("--members-at-once", type=int)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-memory", action="store_true", help="skip the two extra processes")
    parser.add_argument("--only", choices=("joint", "single"), help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(arguments: argparse.Namespace) -> dict[str, object]:
    """Alternate joint and single steps and compare times and weights."""
    base = base_model(arguments)
    singles = [Single(arguments, twin(base), member) for member in range(arguments.members)]
    joint = Joint(arguments, base)
    times: dict[str, list[float]] = {"joint": [], "single": []}
    for step in range(arguments.steps + 1):
        times["joint"].append(timed(arguments.device, lambda step=step: joint.step(step)))
        times["single"].append(timed(arguments.device, lambda step=step: [run.step(step) for run in singles]))
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    peak = gemm_peak(arguments.device, joint.dtype)
    return {
        "machine": machine(arguments.device),
        "setting": {key: value for key, value in vars(arguments).items() if key != "only"},
        "dtype": str(joint.dtype),
        "seconds_joint_step": seconds["joint"],
        "seconds_single_steps": seconds["single"],
        "ratio": seconds["single"] / seconds["joint"],
        "ratios": [s / j for s, j in zip(times["single"][1:], times["joint"][1:], strict=True)],
        "joint_tokens_per_second": joint.tokens / seconds["joint"],
        "joint_tokens": joint.tokens,
        "single_tokens": sum(run.tokens for run in singles),
        "gemm_peak_tflops": peak / 1e12,
        "joint_share_of_gemm_peak": joint.flops / seconds["joint"] / peak,
        "largest_weight_difference": max(
            difference(joint.engine.weights(f"member_{m:02d}"), run.weights())
            for m, run in enumerate(singles)
        ),
        "largest_weight": max(float(w.abs().max()) for w in joint.engine.weights("member_00").values()),
    }


def documents(arguments: argparse.Namespace) -> list[Example]:
    """Random documents: a choice's row has ``--length`` tokens, its answer one token or a few."""
    generator = np.random.default_rng(0)
    answer = 1 if arguments.objective == "answer" else CHOICE_TOKENS
    examples = []
    for i in range(2 * arguments.documents):
        context = tuple(int(t) for t in generator.integers(2, 900, arguments.length + 1 - answer))
        choices = tuple(
            Choice(context, tuple(int(t) for t in generator.integers(2, 900, answer))) for _ in range(CHOICES)
        )
        examples.append(Example("random", i, choices, (i % CHOICES,)))
    return examples


def batches(arguments: argparse.Namespace, step: int) -> list[list[int]]:
    """The documents of every member at a step."""
    return [
        [int(d) for d in np.random.default_rng([step, m]).permutation(2 * arguments.documents)][
            : arguments.documents
        ]
        for m in range(arguments.members)
    ]


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The settings both ways share."""
    return Recipe.from_mapping(
        {
            "base_model": "benchmark",
            "task": "random",
            "members": arguments.members,
            "objective": arguments.objective,
            "alpha": 32,
            "learning_rate": 5e-4,
            "gradient_clip": 1.0,
            "members_at_once": arguments.members_at_once,
            "gradient_checkpointing": arguments.gradient_checkpointing,
        }
    )


def twin(base: Base) -> Base:
    """Copy a model's modules but not its (frozen) weights."""
    shared = {id(p): p for p in base.model.parameters()}
    return dataclasses.replace(base, model=copy.deepcopy(base.model, shared))


def base_model(arguments: argparse.Namespace) -> Base:
    """Load or make the frozen model."""
    dtype = fast_dtype(arguments.device) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    if arguments.base_model:
        model = AutoModelForCausalLM.from_pretrained(resolve_name(arguments.base_model), dtype=dtype)
    else:
        torch.manual_seed(0)
        with torch.device(arguments.device):
            model = AutoModelForCausalLM.from_config(SHAPES[arguments.shape], dtype=dtype)
    model = model.to(arguments.device).eval().requires_grad_(requires_grad=False)
    return Base(model, SimpleNamespace(), model.name_or_path, 10**9)


class Joint:
    """All members in this package's joint step."""

    def __init__(self, arguments: argparse.Namespace, base: Base) -> None:
        recipe, examples = recipe_of(arguments), documents(arguments)
        weights = sum(p.numel() for p in base.model.model.layers.parameters())
        self.arguments = arguments
        self.dtype = base.model.dtype
        self.layout = Layout(
            examples, gold_only=arguments.objective == "answer", use_tree=use_tree_rows(base.model, examples)
        )
        self.length = max(self.layout.lengths())
        members = {f"member_{m:02d}": m for m in range(arguments.members)}
        self.engine = JointEngine(attach(base, recipe, members), members, recipe, self.layout, 10**6)
        self.tokens = arguments.members * arguments.documents * self.layout.rows_per_document * self.length
        head = base.model.get_output_embeddings().weight.numel()
        scored = arguments.members * len(self.layout.batch([[0]], self.length, torch.device("cpu")).scored)
        # Two operations a weight and token forward, two for the input's gradient, none for frozen weights.
        self.flops = 4.0 * (weights * self.tokens + head * scored * arguments.documents)

    def step(self, step: int) -> None:
        """Take one step of every member."""
        self.engine.step([MicroBatch(batches(self.arguments, step), self.length)], step, self.engine.names)


class Single:
    """One member as a user would train it with PEFT."""

    def __init__(self, arguments: argparse.Namespace, base: Base, member: int) -> None:
        from peft import get_peft_model

        self.arguments, self.member, self.examples = arguments, member, documents(arguments)
        torch.manual_seed(member)
        self.model = get_peft_model(base.model, lora_config(recipe_of(arguments), base)).train()
        if arguments.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=5e-4, weight_decay=0.0)
        rows = 1 if arguments.objective == "answer" else CHOICES
        self.tokens = arguments.documents * rows * arguments.length

    def step(self, step: int) -> None:
        """Take one step."""
        chosen = [self.examples[d] for d in batches(self.arguments, step)[self.member]]
        loss = self.answer_loss(chosen) if self.arguments.objective == "answer" else self.choices_loss(chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def answer_loss(self, examples: list[Example]) -> torch.Tensor:
        """The loss that transformers computes from labels: the mean over the answer tokens."""
        rows = [example.choices[example.gold[0]] for example in examples]
        ids = torch.tensor([row.context + row.continuation for row in rows], device=self.arguments.device)
        labels = ids.clone()
        labels[:, : len(rows[0].context)] = -100
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    def choices_loss(self, examples: list[Example]) -> torch.Tensor:
        """One row a choice, cross-entropy over the softmax of the rows' loglikelihoods."""
        rows = [choice for example in examples for choice in example.choices]
        ids = torch.tensor([chain(row).tokens for row in rows], device=self.arguments.device)
        targets = torch.tensor([row.continuation for row in rows], device=self.arguments.device)
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        tokens = logits[:, -targets.shape[1] :].float().log_softmax(-1).gather(-1, targets[..., None])
        gold = torch.tensor([example.gold[0] for example in examples], device=self.arguments.device)
        return torch.nn.functional.cross_entropy(tokens.sum((1, 2)).view(len(examples), -1), gold)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the adapter."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model)


def timed(device: str, work) -> float:
    """Return the seconds that ``work`` takes."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference of two adapters."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def gemm_peak(device: str, dtype: torch.dtype) -> float:
    """The fastest of a few large matrix products, in floating-point operations a second."""
    size = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(device, lambda: a @ b) for _ in range(6))


def memory_of_each(argv: list[str]) -> dict[str, float]:
    """Run the joint step and one single run in processes of their own and compare their peaks."""
    peaks = {}
    for which in ("joint", "single"):
        output = subprocess.run(
            [sys.executable, __file__, *argv, "--only", which], check=True, capture_output=True, text=True
        ).stdout
        peaks[which] = json.loads(output.splitlines()[-1])["peak_bytes"]
    return {
        "peak_bytes_joint": peaks["joint"],
        "peak_bytes_one_single": peaks["single"],
        "memory_ratio": peaks["joint"] / peaks["single"],
    }


def measure_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Take two steps of one way and return the process's peak (on a GPU, the allocator's)."""
    base = base_model(arguments)
    way = Joint(arguments, base) if arguments.only == "joint" else Single(arguments, base, 0)
    for step in range(2):
        way.step(step)
    if arguments.device.startswith("cuda"):
        return {"peak_bytes": torch.cuda.max_memory_allocated()}
    return {"peak_bytes": peak_bytes()}


def machine(device: str) -> str:
    """Name what the numbers were taken on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    main()
