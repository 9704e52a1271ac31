"""lm-eval's files with any number of runs, tasks and texts, in the form its own writer gives them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from scipy import special

Text = Callable[[str, int], str]


def write_run(
    folder: Path,
    tasks: Mapping[str, int],
    *,
    members: int = 5,
    seed: int = 0,
    groups: Mapping[str, list[str]] | None = None,
    config: Mapping[str, object] | None = None,
    text: Text = lambda task, d: f"Question {d} of {task}?",
    sharpness: float = 2.0,
    date: str = "2026-01-02T03-04-05.678901",
) -> Path:
    """Write results and samples of ``tasks`` (name → number of documents) and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "results": {},
        "group_subtasks": dict(groups or {}),
        "config": dict(config or {"model": "lora-ensemble", "model_args": {"adapters": str(folder.name)}}),
        "total_evaluation_time_seconds": "61.5",
    }
    if members > 1 and config is None:
        results["config"]["lora_ensemble"] = {
            "fingerprint": f"{seed:064d}",
            "base_model": "base",
            "epoch": None,
        }
    (folder / f"results_{date}.json").write_text(json.dumps(results))
    for task, n in tasks.items():
        # questions and gold answers are the task's, whoever answers
        data = np.random.default_rng(int(hashlib.sha256(task.encode()).hexdigest()[:8], 16))
        hidden, gold = data.normal(size=(n, 4)) * sharpness, np.zeros(n, dtype=int)
        gold = (special.softmax(hidden, axis=1).cumsum(1) > data.uniform(size=(n, 1))).argmax(1)
        scores = hidden + np.random.default_rng(seed).normal(size=(members, n, 4))
        lines = [_sample(task, d, scores[:, d], int(gold[d]), text(task, d)) for d in range(n)]
        if "lora_ensemble" in results["config"]:
            lines = [{**line, "members": scores[:, d].tolist()} for d, line in enumerate(lines)]
        (folder / f"samples_{task}_{date}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def _sample(task: str, d: int, scores: np.ndarray, gold: int, question: str) -> dict[str, object]:
    answers = {f"gen_args_{c}": {"arg_0": question, "arg_1": f" {question} {c}"} for c in range(4)}
    whole = special.logsumexp(scores, axis=0)
    return {
        "doc_id": d,
        "target": str(gold),
        "arguments": answers,
        "filter": "none",
        "filtered_resps": [[str(value), "False"] for value in whole.tolist()],
        "doc_hash": hashlib.sha256(f"{task}{d}".encode()).hexdigest(),
    }
