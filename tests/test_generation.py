"""Texts of an ensemble against lm-eval's ``hf``: one member, and equal ones, say what it says."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from harness_tasks import WORDS
from test_model import hf, instances

from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM


def prompts(n: int = 30) -> list[str]:
    """Return texts of 1 to 60 words, a few of them alike at their beginning."""
    draw = np.random.default_rng(5)
    texts = [" ".join(draw.choice(WORDS, size=int(draw.integers(1, 60)))) for _ in range(n)]
    return [
        f"The members of an ensemble are adapters of one model, {t}" if i % 3 else t
        for i, t in enumerate(texts)
    ]


def asked(texts: list[str], **kwargs: object):
    return instances(
        [(text, {"until": ["ing", ".\n"], "max_gen_toks": 24, **kwargs}) for text in texts], "generate_until"
    )


def texts_of(model, requests) -> list[str]:
    return model.generate_until(copy.deepcopy(requests), disable_tqdm=True)


@pytest.fixture(scope="module")
def theirs(llama, ensemble):
    return texts_of(hf(llama, ensemble / "member_00", batch_size=1), asked(prompts()))


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_equal_members_say_what_hf_says(ensemble, theirs, copies, batch_size):
    model = LoraEnsembleLM(
        adapters=[str(ensemble / "member_00")] * copies, device="cpu", batch_size=batch_size
    )
    ours = texts_of(model, asked(prompts()))
    assert ours == theirs
    assert len({len(text) for text in theirs}) > 3
