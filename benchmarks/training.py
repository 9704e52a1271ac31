"""N members trained jointly against N single PEFT runs on the same batches.

The single runs are what a user would write: ``get_peft_model``, the model's own forward pass, AdamW. Joint
and single steps alternate in one process over the same frozen weights, so both see the same machine. Peak
memory is measured in a process each.

    python benchmarks/training.py                                # the SmolLM2-135M shape on this machine
    python benchmarks/training.py --objective choices --documents 4
    python benchmarks/training.py --base-model smollm2           # the real weights
    python benchmarks/training.py --shape mistral-7b --length 128 --device cuda          # the paper's batch

With ``--against CHECKOUT`` the joint step of another checkout (of any release since 0.1.0) takes the place of the
single runs; each runs in a process of its own, with the checkout's ``.venv`` if it has one, and the pairs' ratio gets
an interval. A pair is one step of each.

    python benchmarks/training.py --base-model smollm2 --against ../release-0.1.0 --pairs 10
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import against
import numpy as np
import torch
from joint import CHOICES, Joint, base_model, batches, documents, recipe_of
from machine import description, headline, peak_bytes, timed
from peak import gemm_peak, linear_shapes, meaning, meta_model
from shapes import SHAPES
from transformers import AutoConfig

from lm_eval_lora_ensemble.ensemble.base_model import resolve
from lm_eval_lora_ensemble.precision import fast_dtype
from lm_eval_lora_ensemble.train.adapters import lora_config
from lm_eval_lora_ensemble.train.base import Base
from lm_eval_lora_ensemble.train.engine import checkpoint_layers
from lm_eval_lora_ensemble.train.examples import Example


def main() -> None:
    """Print the comparison: as JSON, or as a table if it is with another checkout."""
    options = parse_arguments()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.only:
        print(json.dumps(measure_memory(options)))
        return
    if options.against:
        compare_checkouts(options)
        return
    report = compare(options)
    if not options.no_memory:
        report |= memory_of_each(sys.argv[1:])
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


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
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--only", choices=("joint", "single"), help=argparse.SUPPRESS)
    against.add_arguments(parser)
    options = parser.parse_args()
    if options.dtype == "auto":
        options.dtype = str(fast_dtype(options.device)).removeprefix("torch.")
    if options.base_model:
        options.base_model = resolve(options.base_model)
    return options


def compare(options: argparse.Namespace) -> dict[str, object]:
    """Alternate joint and single steps and compare times and weights."""
    base = base_model(options)
    singles = [Single(options, twin(base), member) for member in range(options.members)]
    peak = gemm_peak(linear_shapes(base.model), base.model.dtype, options.device)
    joint = Joint(options, base)
    with joint.counted():
        joint.step(0)
    for run in singles:
        run.step(0)
    times: dict[str, list[float]] = {"joint": [], "single": []}
    for step in range(1, options.steps + 1):
        times["joint"].append(timed(lambda step=step: joint.step(step), options.device)[0])
        times["single"].append(
            timed(lambda step=step: [run.step(step) for run in singles], options.device)[0]
        )
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        **description(options.device),
        "setting": {
            key: str(value) for key, value in vars(options).items() if key not in {"only", "against", "json"}
        },
        "dtype": options.dtype,
        "seconds_joint_step": seconds["joint"],
        "seconds_single_steps": seconds["single"],
        "ratio": seconds["single"] / seconds["joint"],
        "ratios": [s / j for s, j in zip(times["single"], times["joint"], strict=True)],
        "joint_tokens_per_second": joint.tokens / seconds["joint"],
        "joint_tokens": joint.tokens,
        "single_tokens": sum(run.tokens for run in singles),
        "gemm_peak": meaning(peak, options.dtype, options.device),
        "gemm_peak_tflops": peak / 1e12,
        "joint_share_of_gemm_peak": joint.flops / seconds["joint"] / peak,
        "largest_weight_difference": max(
            difference(joint.engine.weights(f"member_{m:02d}"), run.weights())
            for m, run in enumerate(singles)
        ),
        "largest_weight": max(float(w.abs().max()) for w in joint.engine.weights("member_00").values()),
    }


def twin(base: Base) -> Base:
    """Copy a model's modules but not its (frozen) weights."""
    shared = {id(p): p for p in base.model.parameters()}
    return dataclasses.replace(base, model=copy.deepcopy(base.model, shared))


class Single:
    """One member as a user would train it with PEFT."""

    def __init__(self, options: argparse.Namespace, base: Base, member: int) -> None:
        from peft import get_peft_model

        self.options, self.member, self.examples = options, member, documents(options)
        torch.manual_seed(member)
        self.model = get_peft_model(base.model, lora_config(recipe_of(options), base)).train()
        if options.gradient_checkpointing:
            checkpoint_layers(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=5e-4, weight_decay=0.0)
        rows = 1 if options.objective == "answer" else CHOICES
        self.tokens = options.documents * rows * options.length

    def step(self, step: int) -> None:
        """Take one step."""
        chosen = [self.examples[d] for d in batches(self.options, step)[self.member]]
        loss = self.answer_loss(chosen) if self.options.objective == "answer" else self.choices_loss(chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def answer_loss(self, examples: list[Example]) -> torch.Tensor:
        """The loss that transformers computes from labels: the mean over the answer tokens."""
        rows = [example.choices[example.gold[0]] for example in examples]
        ids = torch.tensor([row.context + row.continuation for row in rows], device=self.options.device)
        labels = ids.clone()
        labels[:, : len(rows[0].context)] = -100
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    def choices_loss(self, examples: list[Example]) -> torch.Tensor:
        """One row a choice, cross-entropy over the softmax of the rows' loglikelihoods."""
        rows = [choice for example in examples for choice in example.choices]
        ids = torch.tensor(
            [(row.context + row.continuation)[:-1] for row in rows], device=self.options.device
        )
        targets = torch.tensor([row.continuation for row in rows], device=self.options.device)
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        tokens = logits[:, -targets.shape[1] :].float().log_softmax(-1).gather(-1, targets[..., None])
        gold = torch.tensor([example.gold[0] for example in examples], device=self.options.device)
        return torch.nn.functional.cross_entropy(tokens.sum((1, 2)).view(len(examples), -1), gold)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the adapter."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference of two adapters."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


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


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Take two steps of one way and return the process's peak (on a GPU, the allocator's)."""
    base = base_model(options)
    way = Joint(options, base) if options.only == "joint" else Single(options, base, 0)
    for step in range(2):
        way.step(step)
    return {"peak_bytes": peak_bytes(options.device)}


def compare_checkouts(options: argparse.Namespace) -> None:
    """Let this checkout's joint step and another's take turns on the same batches, and print the comparison."""
    settings = {key: value for key, value in vars(options).items() if key not in {"against", "json"}}
    row = against.PairedTimes(
        f"{options.objective}, {options.documents} documents of {options.length} tokens a member"
    )
    losses = []
    with (
        against.both("training", options.against, settings) as engines,
        tempfile.TemporaryDirectory() as scratch,
    ):
        against.alternate(
            row, engines, options.pairs, lambda *both: losses.append(np.abs(np.subtract(*both)).max())
        )
        row.differences["losses, nats"] = float(max(losses))
        row.differences["weights"] = against.saved_difference(engines, Path(scratch))
        compared = against.provenance(engines)
    real = options.base_model
    config = AutoConfig.from_pretrained(real) if real else SHAPES[options.shape]
    peak = gemm_peak(linear_shapes(meta_model(config)), getattr(torch, options.dtype), options.device)
    against.report(
        [row],
        compared,
        heading=f"training, N = {options.members}, {headline(options.device, options.dtype)}",
        peak=meaning(peak, options.dtype, options.device),
        json_file=options.json,
    )


if __name__ == "__main__":
    main()
