"""Memory of a long run: flat."""

from __future__ import annotations

import gc

import numpy as np
import psutil
import pytest
from lm_eval.api.model import CachingLM
from test_model import instances, lora

N_REQUESTS = 20_000


def requests(n: int) -> list[tuple[str, str]]:
    """Four choices to each of n / 4 questions of different lengths behind one few-shot prompt."""
    draw = np.random.default_rng(4)
    words = ["member", "adapter", "layer", "prompt", "answer", "choice", "number", "folder"]
    few_shot = "Question: which one is it? Answer: the first. " * 2
    found = []
    for document in range(n // 4):
        question = " ".join(draw.choice(words, size=int(draw.integers(2, 12))))
        found += [(f"{few_shot}{document}: {question}", f" {word} {i}") for i, word in enumerate(words[:4])]
    return found


@pytest.mark.long
def test_memory_is_flat_over_twenty_thousand_requests(ensemble, tmp_path, monkeypatch):
    """Scores, cache and all, as lm-eval asks for them: one call with every request of the run."""
    model = lora(ensemble)
    scores, resident = model._scores, []

    def watched(*args):
        for i, found in enumerate(scores(*args)):
            if i % 100 == 0:
                resident.append(psutil.Process().memory_info().rss)
            yield found

    monkeypatch.setattr(model, "_scores", watched)
    cached = CachingLM(model, str(tmp_path / "cache.db"))
    gc.collect()
    results = cached.loglikelihood(instances(requests(N_REQUESTS)))
    assert len(results) == N_REQUESTS and all(np.isfinite(value.members).all() for value, _ in results)
    warm, most = resident[len(resident) // 10], max(resident)
    print(
        f"{N_REQUESTS} requests, {warm / 2**20:.0f} MiB warm, {most / 2**20:.0f} MiB at most, {most / warm - 1:.2%}"
    )
    assert most <= 1.05 * warm
