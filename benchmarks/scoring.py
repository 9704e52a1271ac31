"""The packed scorer against lm-eval's ``hf``: the same requests, one process, alternating.

For each task the benchmark builds lm-eval's own requests, tokenises them once, and times the scoring loop of
``hf`` with one adapter and of ``lora-ensemble`` with N. Reported per task: seconds (medians), the ratio
N × hf ÷ ours, token positions computed and the least possible, the largest difference of any member's score,
achieved FLOP/s and its share of what the model's own matrix products reach in the same run. Peak memory is
measured in a process each.

    python benchmarks/scoring.py --base smollm2 --tasks arc_easy:0:200,hellaswag:0:100
    python benchmarks/scoring.py --tasks arc_challenge:25:24,mmlu_high_school_geography:5:64 --json out.json
    python benchmarks/scoring.py --shape mistral-7b --random-weights --synthetic mmlu,arc --device cuda --dtype bfloat16

With ``--against CHECKOUT`` the engine of another checkout (of any release since 0.1.0) takes the place of ``hf``; each
runs in a process of its own, with the checkout's ``.venv`` if it has one, and the pairs' ratio gets an interval.

    python benchmarks/scoring.py --tasks arc_easy:0:200 --against ../release-0.1.0 --pairs 6

``--breakdown`` adds where the ensemble's time goes, by torch's profiler. ``--rounding`` measures something else: how
far scores in half precision are from float32, ``hf``'s and the ensemble's.

    python benchmarks/scoring.py --tasks arc_easy:0:125,hellaswag:0:30 --dtype bfloat16 --rounding

A task is ``name:shots:documents``. Without network access to the Hub run it where lm-eval finds the data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import against
import torch
from breakdown import breakdown, table
from lm_eval.models.huggingface import HFLM
from machine import description, headline, peak_bytes, timed
from peak import gemm_peak, linear_shapes, meaning, meta_model, weights
from rounding import distances
from shapes import SHAPES
from transformers import AutoConfig
from workload import SYNTHETIC, items, random_adapters, requests_of, with_random_weights

from lm_eval_lora_ensemble.ensemble.base_model import resolve
from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM
from lm_eval_lora_ensemble.precision import fast_dtype


@dataclass
class TaskTimes:
    """What one task took ``hf`` with one member and this package with N.

    Attributes:
        task: what was scored.
        requests: how many.
        hf_seconds: median seconds of ``hf``.
        ours_seconds: median seconds of the ensemble.
        ratio: N × ``hf_seconds`` ÷ ``ours_seconds``.
        hf_tokens: token positions that ``hf`` computed.
        ours_tokens: token positions computed per member.
        least_tokens: distinct token positions, the least an exact method computes per member.
        largest_difference: of the first member's scores, in nats.
        tflops: 10¹² operations a second of the ensemble: linear layers, attention, head.
        share_of_gemm_peak: the same as a share of :func:`peak.gemm_peak`.
    """

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


@dataclass(frozen=True)
class Work:
    """What the last scoring call computed per member, in counts.

    Attributes:
        computed: token positions, padding and prefixes computed again included.
        least: distinct token positions.
        attended: (query, key) pairs a layer, masked ones included, causal ones once.
        read: positions projected on the vocabulary.
    """

    computed: int
    least: int
    attended: int
    read: int


def work_of(lm: LoraEnsembleLM) -> Work:
    """Return the engine's counts; the only place here that knows their names in it."""
    work = lm.work
    return Work(work.n_computed, work.n_positions, work.n_attended, work.n_head_rows)


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
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    work = work_of(lm)
    each = (
        2 * weights(linear_shapes(lm.model)) * work.computed
        + 4 * width * config.num_hidden_layers * work.attended
        + 2 * config.vocab_size * config.hidden_size * work.read
    )
    return float(each * lm.n_members)


def measure(task: str, hf: HFLM, ours: LoraEnsembleLM, repeats: int, peak: float, device: str) -> TaskTimes:
    """Alternate both on the same requests."""
    requests = requests_of(task, hf)
    theirs_seconds, ours_seconds = [], []
    for _ in range(repeats):
        with counted(hf) as tokens:
            seconds, theirs = timed(lambda: hf._loglikelihood_tokens(requests, disable_tqdm=True), device)
        theirs_seconds.append(seconds)
        seconds, mine = timed(lambda: ours._loglikelihood_tokens(requests, disable_tqdm=True), device)
        ours_seconds.append(seconds)
    hf_median, our_median = statistics.median(theirs_seconds), statistics.median(ours_seconds)
    done, work = flops(ours) / our_median, work_of(ours)
    return TaskTimes(
        task=task,
        requests=len(requests),
        hf_seconds=hf_median,
        ours_seconds=our_median,
        ratio=ours.n_members * hf_median / our_median,
        hf_tokens=tokens[0],
        ours_tokens=work.computed,
        least_tokens=work.least,
        # the first member is the adapter that hf runs
        largest_difference=float(max(abs(m[0].members[0] - t[0]) for m, t in zip(mine, theirs, strict=True))),
        tflops=done / 1e12,
        share_of_gemm_peak=done / peak,
    )


@dataclass(frozen=True)
class Models:
    """What is measured, not yet loaded.

    Attributes:
        config: the base model's configuration.
        base: its folder or Hub id.
        adapters: the folder of the adapters.
        common: arguments that both lm-eval models take.
    """

    config: Any
    base: str
    adapters: Path
    common: dict[str, Any]

    @property
    def ours(self) -> dict[str, Any]:
        """Arguments of ``LoraEnsembleLM``."""
        return {"pretrained": self.base, "adapters": str(self.adapters), "batch_size": "auto", **self.common}

    def hf(self, batch_size: int) -> dict[str, Any]:
        """Arguments of ``HFLM`` with the first adapter."""
        first = sorted(path for path in self.adapters.iterdir() if path.is_dir())[0]
        return {"pretrained": self.base, "peft": str(first), "batch_size": batch_size, **self.common}


def models(options: argparse.Namespace, scratch: Path) -> Models:
    """Fetch or make the base model and the adapters that the command line names."""
    if options.shape:
        config, base = SHAPES[options.shape], str(scratch / options.shape)
        config.save_pretrained(base)
        if not options.random_weights:
            sys.exit("--shape has no weights to load; say --random-weights")
    else:
        base = resolve(options.base)
        config = AutoConfig.from_pretrained(base)
    folder = Path(options.adapters) if options.adapters else scratch / "adapters"
    if not folder.exists():
        random_adapters(config, base, folder, options.members)
    common = {"device": options.device, "dtype": options.dtype, "max_length": 8192}
    if options.shape:
        common["tokenizer"] = options.tokenizer or resolve("smollm2")
    return Models(config, base, folder, common)


def loaders(
    options: argparse.Namespace, found: Models
) -> tuple[Callable[[], HFLM], Callable[[], LoraEnsembleLM]]:
    """Return what loads ``hf`` with the first adapter, and the ensemble."""
    classes: tuple[type, ...] = (HFLM, LoraEnsembleLM)
    if options.shape:
        classes = tuple(map(with_random_weights, classes))
    return (lambda: classes[0](**found.hf(options.hf_batch_size)), lambda: classes[1](**found.ours))


def peak_memory(options: argparse.Namespace, which: str) -> float:
    """Return the peak memory in GiB of one process that loads one model and scores everything once."""
    command = [sys.executable, __file__, *options.arguments, "--only", which]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


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
    parser.add_argument("--tokenizer", help="for --shape (default: smollm2's)")
    parser.add_argument("--tasks", default="", help="name:shots:documents, …")
    parser.add_argument(
        "--synthetic", default="", help=f"any of {', '.join(SYNTHETIC)}, each with :documents if wanted"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: the fast one here")
    parser.add_argument("--hf-batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="skip the two processes that measure memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--breakdown", action="store_true", help="profile the ensemble once a task")
    parser.add_argument("--rounding", action="store_true", help="distances of --dtype from float32, no times")
    parser.add_argument("--only", choices=["hf", "ours"], help=argparse.SUPPRESS)
    against.add_arguments(parser)
    options = parser.parse_args(argv)
    options.arguments = argv
    options.dtype = options.dtype or str(fast_dtype(options.device)).removeprefix("torch.")
    options.items = items(options.tasks, options.synthetic)
    if not options.items:
        parser.error("nothing to score; give --tasks or --synthetic")
    return options


def main(argv: list[str]) -> None:
    """Run the benchmark and print its table."""
    options = arguments(argv)
    with tempfile.TemporaryDirectory() as scratch:
        found = models(options, Path(scratch))
        if options.against:
            compare_checkouts(options, found, Path(scratch))
            return
        load_hf, load_ours = loaders(options, found)
        if options.rounding:
            report_rounding(options, found, load_hf, load_ours)
            return
        if options.only:
            lm = load_hf() if options.only == "hf" else load_ours()
            for item in options.items:
                lm._loglikelihood_tokens(requests_of(item, lm), disable_tqdm=True)
            print(peak_bytes(options.device) / 2**30)
            return
        hf, ours = load_hf(), load_ours()
        peak = gemm_peak(linear_shapes(hf.model), hf.model.dtype, options.device)
        rows = [measure(item, hf, ours, options.repeats, peak, options.device) for item in options.items]
        if options.breakdown:
            profiled = {item: profile(item, ours) for item in options.items}
    memory = {} if options.no_memory else {which: peak_memory(options, which) for which in ("hf", "ours")}
    report(options, rows, peak, memory)
    if options.breakdown:
        print("\n" + table(profiled))


def profile(task: str, ours: LoraEnsembleLM) -> dict[str, float]:
    """Return where the ensemble's seconds go."""
    requests = requests_of(task, ours)
    return breakdown(lambda: ours._loglikelihood_tokens(requests, disable_tqdm=True))


def report_rounding(
    options: argparse.Namespace,
    found: Models,
    load_hf: Callable[[], HFLM],
    load_ours: Callable[[], LoraEnsembleLM],
) -> None:
    """Print how far half precision is from float32."""
    wide = replace(found, common={**found.common, "dtype": "float32"})
    load_exact, _ = loaders(options, wide)
    encoder = load_hf()
    requests = [request for item in options.items for request in requests_of(item, encoder)]
    result = distances(requests, load_exact, load_hf, load_ours)
    print(f"{headline(options.device, options.dtype)}\n{result}")
    if options.json:
        options.json.write_text(json.dumps(result.as_mapping(), indent=2))


def report(options: argparse.Namespace, rows: list[TaskTimes], peak: float, memory: dict[str, float]) -> None:
    """Print a Markdown table and, if asked, write JSON."""
    print(f"N = {options.members}, {headline(options.device, options.dtype)}\n")
    columns = ("task", "requests", "hf, s", "ours, s", f"{options.members} × hf ÷ ours")
    print(
        "|"
        + "|".join((*columns, "hf tokens", "ours", "least", "difference", "TFLOP/s", "of GEMM peak"))
        + "|"
    )
    print("|---|" + "---:|" * 10)
    for r in rows:
        print(
            f"|{r.task}|{r.requests}|{r.hf_seconds:.2f}|{r.ours_seconds:.2f}|{r.ratio:.2f}|{r.hf_tokens}|"
            f"{r.ours_tokens}|{r.least_tokens}|{r.largest_difference:.1e}|{r.tflops:.3f}|{r.share_of_gemm_peak:.0%}|"
        )
    print("\n" + meaning(peak, options.dtype, options.device))
    if memory:
        print(f"peak memory: hf {memory['hf']:.2f} GiB, ours {memory['ours']:.2f} GiB")
    if options.json:
        result = {
            "dtype": options.dtype,
            **description(options.device),
            "gemm_peak_tflops": peak / 1e12,
            "memory_gib": memory,
            "rows": [asdict(r) for r in rows],
        }
        options.json.write_text(json.dumps(result, indent=2))


def compare_checkouts(options: argparse.Namespace, found: Models, scratch: Path) -> None:
    """Let this checkout's engine and another's take turns on the same requests, and print the comparison."""
    settings = {"model": found.ours, "random_weights": bool(options.shape)}
    # encoded here, with a model that has no weights: neither engine's memory holds what a task needs
    without_weights = meta_model(found.config)
    encoder = HFLM(
        pretrained=without_weights, tokenizer=found.common.get("tokenizer", found.base), batch_size=1
    )
    path = scratch / "requests.json"
    rows = []
    with against.both("scoring", options.against, settings) as engines:
        for item in options.items:
            requests = [request[1:] for request in requests_of(item, encoder)]
            path.write_text(json.dumps(requests), encoding="ascii")
            for engine in engines:
                engine.call("take", str(path))
            row = against.PairedTimes(f"{item}, {len(requests)} requests")
            against.alternate(row, engines, options.pairs)
            row.differences["scores, nats"] = against.saved_difference(engines, scratch)
            rows.append(row)
        compared = against.provenance(engines)
    peak = gemm_peak(linear_shapes(without_weights), getattr(torch, options.dtype), options.device)
    against.report(
        rows,
        compared,
        heading=f"scoring, N = {options.members}, {headline(options.device, options.dtype)}",
        peak=meaning(peak, options.dtype, options.device),
        json_file=options.json,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
