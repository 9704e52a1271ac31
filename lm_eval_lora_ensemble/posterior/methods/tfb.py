"""TFB: noise found without training, as large as the adapter's answers to a task allow (arXiv 2412.05723)."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.arrays import BoolArray, FloatArray
from lm_eval_lora_ensemble.metrics.choices import log_choice_probabilities
from lm_eval_lora_ensemble.posterior.contract import AdapterState, Posterior, Source, StoredState
from lm_eval_lora_ensemble.posterior.data import TaskData
from lm_eval_lora_ensemble.posterior.lora_layers import LoraPair, as_state, lora_pairs, one_adapter
from lm_eval_lora_ensemble.posterior.options import Option
from lm_eval_lora_ensemble.posterior.predictive import SCALE, mixture_nll, mixture_of_draws, search_generators
from lm_eval_lora_ensemble.posterior.registry import method
from lm_eval_lora_ensemble.posterior.search import Step, largest_passing
from lm_eval_lora_ensemble.scoring.finite import NonFiniteScoreError
from lm_eval_lora_ensemble.train.scale import ChoiceScale

TOLERANCES = {"nll": 0.003, "predictions": 0.01}
"""Published defaults: relative increase of the anchors' nll; share of them whose answer changes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rotated:
    """One layer in the form that noise is put on: B' = U diag(d), A' = Vᵀ A, whose product is that of B and A.

    Attributes:
        a_name: of A' in the weights file.
        b_name: of B'.
        A: A' [r, in], float64.
        B: B' [out, r].
        spread: 1/d [r], by which σ is multiplied in each row of A'; 0 where d is.
    """

    a_name: str
    b_name: str
    A: torch.Tensor
    B: torch.Tensor
    spread: torch.Tensor


class TrainingFreePosterior(Posterior):
    """Independent Gaussian noise on the rows of A', of standard deviation σ/d_i in row i; B' is a point.

    Through B' the noise of row i enters the layer's weight as u_i σ ε: of one size in every direction of B.

    Args:
        layers: of the adapter.
        state: the adapter, whose other tensors every draw repeats.
        sigma: σ, at least 0.
        config: the source's.
        settings: for the manifest.
    """

    def __init__(
        self,
        layers: Sequence[Rotated],
        state: StoredState,
        sigma: float,
        config: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        self.layers = layers
        self.state = state
        self.sigma = sigma
        self.config = config
        self.settings = settings

    def draw(self, generator: torch.Generator) -> AdapterState:
        """See :meth:`.contract.Posterior.draw`; float32, whatever the source was stored in."""
        tensors: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            noise = torch.randn(layer.A.shape, generator=generator, dtype=torch.float64)
            tensors[layer.a_name] = layer.A + self.sigma * layer.spread[:, None] * noise
            tensors[layer.b_name] = layer.B
        return as_state(tensors, self.state)


@method(
    name="tfb",
    title="noise found without training: as large as the answers to a task allow",
    needs="adapter",
    source="arXiv 2412.05723",
    task=True,
    options={
        "anchors": Option(64, "documents that σ is found on, evenly spread over the split", minimum=1),
        "labels": Option(
            "own", "of the anchors: the adapter's own answers, or the task's", choices=("own", "gold")
        ),
        "criterion": Option(
            "nll",
            "what may change: the labels' nll, or the share of changed predictions",
            choices=tuple(TOLERANCES),
        ),
        "tolerance": Option(
            None,
            "by how much: relative increase of nll, or share of predictions; 0.003 or 0.01",
            float,
            minimum=0,
        ),
        "search_draws": Option(5, "adapters drawn at each σ, whose mixture is measured", minimum=1),
        "search_seed": Option(0, "of their noise, the same at every σ", minimum=0),
        "start": Option(0.01, "σ that is tried first", minimum=1e-12),
        "steps": Option(4, "halvings of log σ between one that passed and one that failed", minimum=0),
        **SCALE,
    },
)
def fit(
    source: Source,
    data: TaskData | None,
    *,
    anchors: int,
    labels: str,
    criterion: str,
    tolerance: float | None,
    search_draws: int,
    search_seed: int,
    start: float,
    steps: int,
    choice_scores: str,
    choice_temperature: float,
) -> TrainingFreePosterior:
    """Find the largest σ at which draws still answer the anchors as the adapter does.

    The search measures the mixture of ``search_draws`` plain adapters with the same standard normal numbers at every σ.
    The reference implementation gives each token noise of its own signs, which partly averages out; a σ found with it
    is too large for adapters.

    Args:
        source: one LoRA adapter on linear layers.
        data: the task, whose split the anchors are from.
        anchors: documents, evenly spread over the split.
        labels: ``own`` (the adapter's own answers) or ``gold``.
        criterion: ``nll``, of the anchors' labels under the mixture, or ``predictions``, the share that change.
        tolerance: by how much the nll may rise, relative to the adapter's, or which share of predictions may change;
            None is 0.003 or 0.01.
        search_draws: adapters whose mixture is measured.
        search_seed: of their noise.
        start: σ that is tried first.
        steps: halvings of log σ after it is bracketed within a factor of 3; 4 leave 7 %.
        choice_scores: ``sum`` or ``chars``, as in a recipe.
        choice_temperature: of the softmax over the choices, as in a recipe.

    Raises:
        EnsembleError: no task, an adapter that the method is wrong for, or noise of any size passes.
    """
    adapter = one_adapter(source, "tfb")
    layers = rotate(lora_pairs(adapter, "tfb"), adapter.name)
    if data is None:
        raise EnsembleError("tfb needs a task whose training documents are its anchors; give task=NAME")
    scale = ChoiceScale(choice_scores, choice_temperature)
    limit = TOLERANCES[criterion] if tolerance is None else tolerance
    documents = data.sample(anchors)
    own = log_choice_probabilities(data.loglikelihoods(documents) / data.divisors(documents, scale))
    right = _own_answers(own) if labels == "own" else documents.is_gold
    bar = tqdm(desc="tfb: draws scored", unit="draw", leave=False)

    def mixture_at(sigma: float) -> FloatArray:
        posterior = TrainingFreePosterior(layers, adapter.state, sigma, adapter.config, {})
        return mixture_of_draws(
            data, documents, scale, posterior, search_generators(search_seed, search_draws), bar.update
        )

    path: list[Step] = []
    try:
        sigma = largest_passing(
            functools.partial(_measured, mixture_at, own, right, criterion, path),
            limit,
            start=start,
            steps=steps,
            path=path,
        )
    finally:
        bar.close()
    settings = {
        "sigma": sigma,
        "anchors": documents.as_mapping(),
        "labels": labels,
        "criterion": criterion,
        "tolerance": limit,
        "search_draws": search_draws,
        "search_seed": search_seed,
        "choice_scores": choice_scores,
        "choice_temperature": choice_temperature,
        "path": [step.as_mapping() for step in path],
    }
    return TrainingFreePosterior(layers, adapter.state, sigma, adapter.config, settings)


def rotate(pairs: Sequence[LoraPair], name: str) -> list[Rotated]:
    """Turn each pair into the form with B' = U diag(d), from the singular value decomposition B = U diag(d) Vᵀ.

    Args:
        pairs: of one adapter.
        name: the adapter's, for messages.

    Raises:
        EnsembleError: every B is 0.
    """
    layers = [_rotated(pair) for pair in pairs]
    if not any(bool((layer.spread > 0).any()) for layer in layers):
        raise EnsembleError(
            f"{name} is untrained: every B is 0, so noise on A changes nothing; train it first"
        )
    return layers


def _rotated(pair: LoraPair) -> Rotated:
    rank = len(pair.A)
    # Vᵀ whole, [r, r], also where B has fewer rows than columns: A' keeps the shape of A. U never, for it would be as
    # wide as an output head has rows.
    u, d, vt = torch.linalg.svd(pair.B, full_matrices=len(pair.B) < rank)
    k = len(d)
    B = torch.zeros_like(pair.B)
    B[:, :k] = u[:, :k] * d
    # σ/d_i has no limit that an adapter can express where d_i = 0: the row of A' is multiplied by a column of zeros, so
    # noise of any size there adds nothing to the layer, and infinite noise makes 0 · inf. Rounding leaves d_i a little
    # above 0 in a B without full rank; the threshold is that of numerical rank, in the precision B was trained in.
    negligible = d.max() * max(pair.B.shape) * torch.finfo(torch.float32).eps
    spread = torch.zeros(rank, dtype=torch.float64)
    spread[:k] = torch.where(d > negligible, 1 / d, 0.0)
    return Rotated(pair.a_name, pair.b_name, vt @ pair.A, B, spread)


def _measured(
    mixture_at: Callable[[float], FloatArray],
    own: FloatArray,
    right: BoolArray,
    criterion: str,
    path: Sequence[Step],
    sigma: float,
) -> float:
    """Return by how much the mixture at σ departs from the adapter's own answers, and log it."""
    try:
        value = departure(mixture_at(sigma), own, right, criterion)
    except NonFiniteScoreError:  # noise so wide that the model overflows
        value = math.inf
    what = "nll rises by" if criterion == "nll" else "predictions changed"
    logger.info("tfb %d: sigma %.4g, %s %.3g %%", len(path) + 1, sigma, what, 100 * value)
    return value


def departure(mixture: FloatArray, own: FloatArray, right: BoolArray, criterion: str) -> float:
    """Return the relative increase of nll (at most 0 if it falls), or the share of predictions that change.

    Args:
        mixture: log-probabilities (D, C) of the draws' mixture.
        own: the adapter's.
        right: (D, C), the labels; of several the total mass counts.
        criterion: ``nll`` or ``predictions``.
    """
    if criterion == "predictions":
        return float((mixture.argmax(-1) != own.argmax(-1)).mean())
    before, after = mixture_nll(own, right), mixture_nll(mixture, right)
    if before == 0:  # every anchor is certain, to the last digit
        return 0.0 if after == 0 else math.inf
    return after / before - 1


def _own_answers(log_probabilities: FloatArray) -> BoolArray:
    right = np.zeros(log_probabilities.shape, dtype=bool)
    right[np.arange(len(right)), log_probabilities.argmax(-1)] = True
    return right
