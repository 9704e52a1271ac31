"""The predictive of a posterior's draws on documents: what a search over its width measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray
from lm_eval_lora_ensemble.metrics.choices import log_choice_probabilities
from lm_eval_lora_ensemble.posterior.contract import Posterior
from lm_eval_lora_ensemble.posterior.data import Documents, TaskData
from lm_eval_lora_ensemble.posterior.options import Option
from lm_eval_lora_ensemble.train.scale import ChoiceScale

SCALE = {
    "choice_scores": Option(
        "sum",
        "what a choice is judged by: its loglikelihood, or that per character; as in a recipe",
        choices=("sum", "chars"),
    ),
    "choice_temperature": Option(1.0, "of the softmax over the choices; as in a recipe", minimum=1e-6),
}
"""The scale of the likelihood, an option of every method that fits to a task."""


def search_generators(seed: int, count: int) -> list[torch.Generator]:
    """Return fresh generators for the draws of one evaluation: the same noise at every one (common random numbers).

    Their seeds are a stream of their own, so that the draws of a search are not the draws that are kept.
    """
    seeds = np.random.SeedSequence([seed, 0x5EA7C4]).generate_state(count, np.uint64)
    return [torch.Generator().manual_seed(int(value >> np.uint64(1))) for value in seeds]


def mixture_of_draws(
    data: TaskData,
    documents: Documents,
    scale: ChoiceScale,
    posterior: Posterior,
    generators: Iterable[torch.Generator],
    done: Callable[[], object],
) -> FloatArray:
    """Return log p̄ (D, C), p̄ the mean over draws of the softmax over a document's scaled scores.

    Args:
        data: scores the draws, one after another in the source's place.
        documents: D of them.
        scale: of the scores.
        posterior: what is drawn from.
        generators: one a draw.
        done: called after each draw.
    """
    divisors = data.divisors(documents, scale)
    total: FloatArray | None = None
    count = 0
    for generator in generators:
        scores = data.loglikelihoods(documents, posterior.draw(generator))
        log_p = log_choice_probabilities(scores / divisors)
        total = log_p if total is None else np.logaddexp(total, log_p)
        count += 1
        done()
    if total is None:
        raise ValueError("a mixture of no draws")
    mixture: FloatArray = total - math.log(count)
    return mixture


def mixture_nll(log_probabilities: FloatArray, right: BoolArray) -> float:
    """Return the mean negative log-probability of the right choices, nats; of several right ones the total counts.

    Args:
        log_probabilities: (D, C).
        right: (D, C).
    """
    return float(-np.logaddexp.reduce(np.where(right, log_probabilities, -np.inf), axis=-1).mean())
