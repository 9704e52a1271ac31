"""Text from an ensemble against lm-eval's ``hf``, one member at a time: seconds, memory, and what they could be.

    python benchmarks/generation.py --model FOLDER [--adapters FOLDER] [--sets chat,forced,apart] [--prompts 64]

* ``chat``: arc_challenge_chat as it stands, chat template and all; answers of some two tokens.
* ``forced``: its prompts, of about 130 tokens, with 64 new tokens each, whatever they are.
* ``apart``: as many random texts of 130 tokens that share no beginning, with 64 new tokens each.

Each engine runs in a process of its own for each batch size, so that its peak of memory is its own; of ``hf`` the best
batch size counts, and N times its seconds for one member. Without ``--adapters``, random ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import description, peak_bytes, timed
from peak import gemm_peak, linear_shapes, meaning, weights
from transformers import AutoConfig
from workload import random_adapters

NEW_TOKENS = 64
APART_TOKENS = 130


def requests_of(kind: str, lm: Any, count: int) -> list[Any]:
    """Return lm-eval's requests of a set."""
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    forced = {"max_gen_toks": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "until": [], "do_sample": False}
    if kind == "apart":
        draw = np.random.default_rng(0)
        ids = draw.integers(0, len(lm.tokenizer), (count, APART_TOKENS)).tolist()
        texts = [lm.tokenizer.decode(row) for row in ids]
        return [
            Instance("generate_until", doc={}, arguments=(text, forced), idx=0, metadata=("apart", i, 1))
            for i, text in enumerate(texts)
        ]
    (task,) = TaskManager().load(["arc_challenge_chat"])["tasks"].values()
    task.set_fewshot_seed(1234)
    task.build_all_requests(
        limit=count,
        rank=0,
        world_size=1,
        apply_chat_template=True,
        fewshot_as_multiturn=False,
        chat_template=lm.apply_chat_template,
        tokenizer_name=lm.tokenizer_name,
    )
    instances = list(task.instances)
    if kind == "forced":
        for instance in instances:
            instance.arguments = (instance.args[0], forced)
    return instances


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """Run one engine at one batch size in this process."""
    common = {"device": settings["device"], "dtype": settings["dtype"], "batch_size": settings["batch_size"]}
    if settings["engine"] == "hf":
        from lm_eval.models.huggingface import HFLM

        lm: Any = HFLM(pretrained=settings["model"], peft=settings["members"][0], **common)
    else:
        from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM

        lm = LoraEnsembleLM(
            pretrained=settings["model"], adapters=settings["members"], allow_base_mismatch=True, **common
        )
    requests = requests_of(settings["set"], lm, settings["prompts"])
    lm.generate_until(
        requests[:2], disable_tqdm=True
    )  # the first pass also allocates, and tries how members run
    seconds, texts = [], []
    for _ in range(settings["repeats"]):
        took, texts = timed(lambda: lm.generate_until(requests, disable_tqdm=True), settings["device"])
        seconds.append(took)
    prompt_tokens = [len(lm.tok_encode(request.args[0])) for request in requests]
    answer_tokens = [max(1, len(lm.tok_encode(text))) for text in texts]
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes(settings["device"]),
        "prompt_tokens": sum(prompt_tokens),
        "answer_tokens": sum(answer_tokens),
        "machine": description(settings["device"]),
    }


def started(settings: dict[str, Any]) -> dict[str, Any]:
    """Run :func:`work` in a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def floor_seconds(model: Any, members: int, prompt_tokens: int, answer_tokens: int, peak: float) -> float:
    """Return what the products of the linear layers alone take: every member's, of every token, at their peak."""
    linear = weights(linear_shapes(model))
    head = model.get_output_embeddings().weight.numel()
    operations = 2 * members * ((prompt_tokens + answer_tokens) * linear + answer_tokens * head)
    return operations / peak


def main(arguments: argparse.Namespace) -> None:
    """Compare, and print a table."""
    config = AutoConfig.from_pretrained(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.adapters or random_adapters(
            config, arguments.model, Path(folder), arguments.members
        )
        members = [str(path.parent) for path in sorted(Path(place).glob("*/adapter_config.json"))][
            : arguments.members
        ]
        from peak import meta_model

        model = meta_model(config)
        dtype = getattr(torch, arguments.dtype)
        peak = gemm_peak(linear_shapes(model), dtype, arguments.device)
        print(meaning(peak, dtype, arguments.device))
        for kind in arguments.sets.split(","):
            common = {
                "set": kind,
                "model": arguments.model,
                "members": members,
                "prompts": arguments.prompts,
                "repeats": arguments.repeats,
                "device": arguments.device,
                "dtype": arguments.dtype,
            }
            best: dict[str, tuple[float, int, dict[str, Any]]] = {}
            for engine, sizes in (("hf", arguments.hf_batch_sizes), ("ours", arguments.batch_sizes)):
                for size in map(int, sizes.split(",")):
                    found = started({**common, "engine": engine, "batch_size": size})
                    seconds = statistics.median(found["seconds"])
                    print(
                        f"  {kind}, {engine}, batch {size}: {seconds:.2f} s, peak {found['peak_bytes'] / 2**20:.0f} MiB"
                    )
                    if engine not in best or seconds < best[engine][0]:
                        best[engine] = (seconds, size, found)
            theirs, ours = best["hf"], best["ours"]
            found = ours[2]
            floor = floor_seconds(model, len(members), found["prompt_tokens"], found["answer_tokens"], peak)
            print(
                f"{kind}: {len(members)} × hf (batch {theirs[1]}) {len(members) * theirs[0]:.1f} s, "
                f"ours (batch {ours[1]}) {ours[0]:.1f} s: {len(members) * theirs[0] / ours[0]:.2f} ×; peak memory "
                f"{ours[2]['peak_bytes'] / theirs[2]['peak_bytes']:.2f} × one hf run; "
                f"{found['answer_tokens'] / ours[0]:.1f} answer tokens/s; products alone, nothing shared, "
                f"{floor:.1f} s; "
                f"{found['machine']}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=False, help="folder or Hub id of the base model")
    parser.add_argument("--adapters", type=Path, help="folder of adapters; random ones if left out")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--sets", default="chat,forced")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hf-batch-sizes", default="8,16,32,64")
    parser.add_argument("--batch-sizes", default="8,16,32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(json.loads(options.worker))))
    elif not options.model:
        parser.error("--model is needed")
    else:
        main(options)
