"""The packed scorer against lm-eval's ``hf``: the same requests, one process, alternating.

For each task the benchmark builds lm-eval's own requests, tokenises them once, and times the scoring loop of
``hf`` with one adapter and of ``lora-ensemble`` with N. Reported per task: seconds (medians), the ratio
N × hf ÷ ours, token positions computed and the least possible, the largest difference of any member's score,
achieved FLOP/s and its share of a matrix product measured in the same run. Peak memory is measured in a
process each.

    python benchmarks/scoring.py --base smollm2 --tasks arc_easy:0:200,hellaswag:0:100
    python benchmarks/scoring.py --tasks arc_challenge:25:24,mmlu_high_school_geography:5:64 --json out.json
    python benchmarks/scoring.py --shape mistral-7b --random-weights --synthetic mmlu,arc --device cuda --dtype bfloat16

A task is ``name:shots:documents``. Without network access to the Hub run it where lm-eval finds the data.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from memory import peak_bytes
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from shapes import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

from lm_eval_lora_ensemble.ensemble.base_model import resolve
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.precision import fast_dtype

# (shared prefix, context, choices, tokens a choice, documents): like MMLU 5-shot and ARC-Challenge 25-shot
SYNTHETIC = {"mmlu": (520, 110, 4, 1, 256), "arc": (0, 1050, 4, 6, 48), "hellaswag": (0, 60, 4, 30, 128)}


@dataclass
class Row:
    """One line of the result."""

    task: str
    requests: int
    hf_seconds: float
    ours_seconds: float
    ratio: float
    hf_tokens: int
    ours_tokens: int
    least_tokens: int
    largest_difference: float
    tflops: float
    share_of_gemm_peak: float


class RandomWeights:
    """Stands in for ``AutoModelForCausalLM`` where a shape is measured: same configuration, random weights."""

    @staticmethod
    def from_pretrained(folder: str, *, dtype: Any = None, device_map: Any = None, **_: Any) -> Any:
        """Initialise the model of ``folder``'s configuration where it will run."""
        where = device_map[""] if isinstance(device_map, dict) else "cpu"
        torch.manual_seed(0)
        with torch.device(where):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def random_adapters(config: Any, base: str, folder: Path, members: int) -> Path:
    """Write N random LoRA adapters (r 8, α 32, q_proj and v_proj) without loading the base model."""
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    lora.base_model_name_or_path = base  # get_peft_model put the meta model's own name, None
    shapes = {name: value.shape for name, value in get_peft_model_state_dict(model).items()}
    for member in range(members):
        draw = torch.Generator().manual_seed(member)
        target = folder / f"member_{member:02d}"
        target.mkdir(parents=True)
        save_file(
            {name: torch.randn(shape, generator=draw) * 0.02 for name, shape in shapes.items()},
            target / "adapter_model.safetensors",
        )
        lora.save_pretrained(target)
    return folder


def lm_eval_requests(lm: HFLM, task: str, shots: int, documents: int) -> list[Any]:
    """Return the encoded requests of an lm-eval task, as ``TemplateLM.loglikelihood`` makes them."""
    from lm_eval.tasks import TaskManager

    (loaded,) = TaskManager().load([task])["tasks"].values()
    loaded.set_config("num_fewshot", shots)
    loaded.set_fewshot_seed(1234)
    loaded.build_all_requests(limit=documents, rank=0, world_size=1)
    return [(r.args, *lm._encode_pair(*r.args)) for r in loaded.instances]


def synthetic_requests(kind: str, vocabulary: int) -> list[Any]:
    """Return random token requests of a benchmark's shape."""
    prefix, context, choices, length, documents = SYNTHETIC[kind]
    draw = np.random.default_rng(0)
    shared = draw.integers(0, vocabulary, prefix).tolist()
    found = []
    for _ in range(documents):
        document = shared + draw.integers(0, vocabulary, context).tolist()
        found += [(None, document, draw.integers(0, vocabulary, length).tolist()) for _ in range(choices)]
    return found


def gemm_peak(device: str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square matrix product, best of five."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device)[0] for _ in range(5))


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Return seconds and result of a call, the device's queue drained."""
    start = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@contextmanager
def counted(lm: HFLM) -> Iterator[list[int]]:
    """Count the token positions ``hf`` computes."""
    counts, call = [0], lm._model_call

    def counting(inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts[0] += inputs.numel()
        return call(inputs, *rest)

    lm._model_call = counting
    try:
        yield counts
    finally:
        del lm._model_call


def flops(lm: LoraEnsembleLM) -> float:
    """Return the FLOPs of the last scoring call of all members: linear layers, attention, head."""
    config = lm.config.get_text_config()
    decoder = lm._packed_model.decoder
    linear = sum(
        m.weight.numel()
        for name, m in decoder.named_modules()
        if isinstance(m, torch.nn.Linear) and "lora_" not in name
    )
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    work = lm.work
    each = (
        2 * linear * work.n_computed
        + 4 * width * config.num_hidden_layers * work.n_attended
        + 2 * config.vocab_size * config.hidden_size * work.n_head_rows
    )
    return float(each * lm.n_members)


def measure(
    task: str, requests: list[Any], hf: HFLM, ours: LoraEnsembleLM, options: argparse.Namespace
) -> Row:
    """Alternate both on the same requests."""
    theirs_seconds, ours_seconds = [], []
    for _ in range(options.repeats):
        with counted(hf) as tokens:
            seconds, theirs = timed(
                lambda: hf._loglikelihood_tokens(requests, disable_tqdm=True), options.device
            )
        theirs_seconds.append(seconds)
        seconds, mine = timed(lambda: ours._loglikelihood_tokens(requests, disable_tqdm=True), options.device)
        ours_seconds.append(seconds)
    hf_median, our_median = statistics.median(theirs_seconds), statistics.median(ours_seconds)
    done = flops(ours) / our_median
    return Row(
        task=task,
        requests=len(requests),
        hf_seconds=hf_median,
        ours_seconds=our_median,
        ratio=ours.n_members * hf_median / our_median,
        hf_tokens=tokens[0],
        ours_tokens=ours.work.n_computed,
        least_tokens=ours.work.n_positions,
        # the first member is the adapter that hf runs
        largest_difference=float(max(abs(m[0].members[0] - t[0]) for m, t in zip(mine, theirs, strict=True))),
        tflops=done / 1e12,
        share_of_gemm_peak=done / gemm_peak(options.device, hf.model.dtype),
    )


def models(
    options: argparse.Namespace, scratch: Path
) -> tuple[Callable[[], HFLM], Callable[[], LoraEnsembleLM]]:
    """Return what loads ``hf`` with the first adapter, and the ensemble."""
    classes: tuple[type, type] = (HFLM, LoraEnsembleLM)
    if options.shape:
        config, base = SHAPES[options.shape], str(scratch / options.shape)
        config.save_pretrained(base)
        if not options.random_weights:
            sys.exit("--shape has no weights to load; say --random-weights")
        classes = tuple(type(c.__name__, (c,), {"AUTO_MODEL_CLASS": RandomWeights}) for c in classes)  # type: ignore[assignment]
    else:
        base = resolve(options.base)
        config = AutoConfig.from_pretrained(base)
    folder = Path(options.adapters) if options.adapters else scratch / "adapters"
    if not folder.exists():
        random_adapters(config, base, folder, options.members)
    common = {"device": options.device, "dtype": options.dtype, "max_length": 8192}
    if options.shape:
        common["tokenizer"] = options.tokenizer or resolve("smollm2")
    first = sorted(path for path in folder.iterdir() if path.is_dir())[0]
    return (
        lambda: classes[0](pretrained=base, peft=str(first), batch_size=options.hf_batch_size, **common),
        lambda: classes[1](pretrained=base, adapters=str(folder), batch_size="auto", **common),
    )


def peak_memory(options: argparse.Namespace, which: str) -> float:
    """Return the peak memory in GiB of one process that loads one model and scores everything once."""
    command = [sys.executable, __file__, *options.arguments, "--only", which]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def request_sets(options: argparse.Namespace, lm: HFLM) -> dict[str, list[Any]]:
    """Return the requests of every task asked for, by name."""
    found = {}
    for item in filter(None, options.tasks.split(",")):
        name, shots, documents = item.split(":")
        found[item] = lm_eval_requests(lm, name, int(shots), int(documents))
    for kind in filter(None, options.synthetic.split(",")):
        found[f"synthetic {kind}"] = synthetic_requests(kind, lm.config.get_text_config().vocab_size)
    return found


def arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2", help="base model: a folder, a Hub id, or smollm2")
    parser.add_argument("--adapters", help="folder of adapters (default: random ones)")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--tokenizer", help="for --shape with --tasks (default: smollm2's)")
    parser.add_argument("--tasks", default="", help="name:shots:documents, …")
    parser.add_argument("--synthetic", default="", help=f"any of {', '.join(SYNTHETIC)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: the fast one here")
    parser.add_argument("--hf-batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="skip the two processes that measure memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=["hf", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.arguments = argv
    options.dtype = options.dtype or str(fast_dtype(options.device)).removeprefix("torch.")
    return options


def main(argv: list[str]) -> None:
    """Run the benchmark and print its table."""
    options = arguments(argv)
    with tempfile.TemporaryDirectory() as scratch:
        load_hf, load_ours = models(options, Path(scratch))
        if options.only:
            lm = load_hf() if options.only == "hf" else load_ours()
            for requests in request_sets(options, lm).values():
                lm._loglikelihood_tokens(requests, disable_tqdm=True)
            used = torch.cuda.max_memory_allocated() if options.device != "cpu" else peak_bytes()
            print(used / 2**30)
            return
        hf, ours = load_hf(), load_ours()
        rows = [
            measure(task, requests, hf, ours, options) for task, requests in request_sets(options, hf).items()
        ]
    memory = {} if options.no_memory else {which: peak_memory(options, which) for which in ("hf", "ours")}
    report(options, rows, memory)


def report(options: argparse.Namespace, rows: list[Row], memory: dict[str, float]) -> None:
    """Print a Markdown table and, if asked, write JSON."""
    packages = {name: version(name) for name in ("lm_eval", "torch", "transformers", "peft")}
    processor = (
        torch.cuda.get_device_name()
        if options.device != "cpu"
        else platform.processor() or platform.machine()
    )
    print(
        f"N = {options.members}, {options.dtype}, {processor}, {torch.get_num_threads()} threads, {packages}"
    )
    columns = ("task", "requests", "hf, s", "ours, s", f"{options.members} × hf ÷ ours")
    print("|" + "|".join((*columns, "hf tokens", "ours", "least", "difference", "TFLOP/s", "of GEMM")) + "|")
    print("|---|" + "---:|" * 10)
    for r in rows:
        print(
            f"|{r.task}|{r.requests}|{r.hf_seconds:.2f}|{r.ours_seconds:.2f}|{r.ratio:.2f}|{r.hf_tokens}|"
            f"{r.ours_tokens}|{r.least_tokens}|{r.largest_difference:.1e}|{r.tflops:.3f}|{r.share_of_gemm_peak:.0%}|"
        )
    if memory:
        print(f"peak memory: hf {memory['hf']:.2f} GiB, ours {memory['ours']:.2f} GiB")
    if options.json:
        result = {
            "dtype": options.dtype,
            "versions": packages,
            "memory_gib": memory,
            "rows": [asdict(r) for r in rows],
        }
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
