"""Laplace: a Gaussian around the adapter whose precision is the Fisher matrix on a task, Kronecker-factored.

The idea is that of arXiv 2308.13111 (Laplace-LoRA). What is published with it is a linearised predictive, which is no
adapter; here weights are drawn. Draws leave the region in which the network is linear, and with the prior precision
that the evidence prefers they may answer far worse than the adapter. By default the precision is therefore chosen by
the nll of the draws themselves, on documents that the curvature does not see.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.metrics.choices import log_choice_probabilities
from lm_eval_lora_ensemble.posterior.contract import Source, SourceAdapter
from lm_eval_lora_ensemble.posterior.data import Documents, TaskData
from lm_eval_lora_ensemble.posterior.gaussian import (
    PRECISION_RANGE,
    KroneckerPosterior,
    UncertainWeight,
    marginal_likelihood_precision,
)
from lm_eval_lora_ensemble.posterior.kfac import kronecker_factors
from lm_eval_lora_ensemble.posterior.lora_layers import LoraPair, lora_pairs, one_adapter
from lm_eval_lora_ensemble.posterior.options import Option
from lm_eval_lora_ensemble.posterior.predictive import SCALE, mixture_nll, mixture_of_draws, search_generators
from lm_eval_lora_ensemble.posterior.registry import method
from lm_eval_lora_ensemble.posterior.search import Step, least
from lm_eval_lora_ensemble.scoring.finite import NonFiniteScoreError
from lm_eval_lora_ensemble.train.scale import ChoiceScale

logger = logging.getLogger(__name__)


@method(
    name="laplace",
    title="Gaussian by the Kronecker-factored Fisher matrix of a task",
    needs="adapter",
    source="arXiv 2308.13111",
    task=True,
    options={
        "prior_precision": Option(None, "λ itself, instead of finding it", float, minimum=1e-12),
        "prior": Option(
            "draws",
            "how λ is found: by the nll of draws on held-out documents, or by the marginal likelihood",
            choices=("draws", "marglik"),
        ),
        "layers": Option(
            "all", "A and B of all adapted layers, or B of the last one alone", choices=("all", "last")
        ),
        "documents": Option(128, "documents for the curvature, evenly spread over the split", minimum=1),
        "training_size": Option(
            None, "documents that the curvature stands for; all of the split", int, minimum=1
        ),
        "prior_documents": Option(64, "held-out documents for prior=draws", minimum=1),
        "search_draws": Option(5, "adapters drawn at each λ, whose mixture is measured", minimum=1),
        "search_seed": Option(0, "of their noise, the same at every λ", minimum=0),
        **SCALE,
    },
)
def fit(
    source: Source,
    data: TaskData | None,
    *,
    prior_precision: float | None,
    prior: str,
    layers: str,
    documents: int,
    training_size: int | None,
    prior_documents: int,
    search_draws: int,
    search_seed: int,
    choice_scores: str,
    choice_temperature: float,
) -> KroneckerPosterior:
    """Fit N(θ, (n·F + λI)⁻¹), θ the adapter's A and B, F the Fisher matrix of a document's choices, Kronecker-factored.

    The likelihood is the softmax over a document's choices, which for answers of one letter is the published one: the
    next-token distribution over the letters. The curvature uses no labels: the expectation over classes is exact, with
    one backward pass a choice.

    Args:
        source: one LoRA adapter on linear layers.
        data: the task; its split gives the curvature.
        prior_precision: λ itself, instead of finding it.
        prior: ``draws``, the λ at which the mixture of draws has the least nll on held-out documents, or ``marglik``,
            that of the greatest evidence.
        layers: ``all``, or ``last``: B of the last adapted layer alone, in the model's order. Where that is the output
            head and answers are one token, scores are linear in B and draws have exactly the linearised predictive.
        documents: for the curvature, evenly spread over the split.
        training_size: n, by which the mean curvature is multiplied; None is the size of the split.
        prior_documents: held out for ``draws``: of the validation split where lm-eval does not evaluate it, else of the
            curvature's split, apart from its documents.
        search_draws: adapters whose mixture is measured.
        search_seed: of their noise.
        choice_scores: ``sum`` or ``chars``, as in a recipe.
        choice_temperature: of the softmax over the choices, as in a recipe.

    Raises:
        EnsembleError: no task, or an adapter that the method is wrong for.
    """
    adapter = one_adapter(source, "laplace")
    pairs = lora_pairs(adapter, "laplace")
    if data is None:
        raise EnsembleError("laplace needs a task for its curvature; give task=NAME")
    scale = ChoiceScale(choice_scores, choice_temperature)
    sample = data.sample(documents)
    n = data.total if training_size is None else training_size
    weights = curvature(data, sample, scale, pairs, layers, n / len(sample))
    path: list[Step] = []
    held_out: Documents | None = None
    evidence = marginal_likelihood_precision(list(weights.values()))
    if prior_precision is not None:
        precision = float(prior_precision)
    elif prior == "marglik":
        precision = evidence
    else:
        held_out = _held_out(data, prior_documents, sample)
        precision = precision_by_draws(
            data, held_out, scale, adapter, weights, evidence, search_seed, search_draws, path
        )
    logger.info("laplace: prior precision %.4g (evidence %.4g)", precision, evidence)
    settings = {
        "prior_precision": precision,
        "prior": "given" if prior_precision is not None else prior,
        "evidence_precision": evidence,
        "documents": sample.as_mapping(),
        "training_size": n,
        "layers": layers,
        "held_out": None if held_out is None else held_out.as_mapping(),
        "search_draws": search_draws,
        "search_seed": search_seed,
        "choice_scores": choice_scores,
        "choice_temperature": choice_temperature,
        "path": [step.as_mapping() for step in path],
    }
    return KroneckerPosterior(adapter.state, weights, precision, adapter.config, settings)


def curvature(
    data: TaskData, sample: Documents, scale: ChoiceScale, pairs: list[LoraPair], layers: str, count: float
) -> dict[str, UncertainWeight]:
    """Return the uncertain weights by their names in the weights file.

    Args:
        data: gives the scores of the sample as functions of the adapter.
        sample: the documents.
        scale: of the scores.
        pairs: of the adapter.
        layers: ``all`` or ``last``.
        count: what the sample's summed curvature is multiplied by.
    """
    means, modules = {}, {}
    model = data.model.base_model.model
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    ordered = sorted(pairs, key=lambda pair: places[pair.layer])
    for pair in ordered[-1:] if layers == "last" else ordered:
        layer = model.get_submodule(pair.layer)
        if layers == "all":
            means[pair.a_name], modules[pair.a_name] = pair.A, layer.lora_A[data.adapter_name]
        means[pair.b_name], modules[pair.b_name] = pair.B, layer.lora_B[data.adapter_name]
    with _requiring_gradients(modules):
        passes = tqdm(
            data.differentiable(sample, scale),
            total=len(sample),
            desc="laplace: documents",
            unit="document",
            leave=False,
        )
        factors = kronecker_factors(modules, passes)
    return {name: UncertainWeight(means[name], factors[name], count) for name in modules}


def precision_by_draws(
    data: TaskData,
    held_out: Documents,
    scale: ChoiceScale,
    adapter: SourceAdapter,
    weights: Mapping[str, UncertainWeight],
    start: float,
    seed: int,
    draws: int,
    path: list[Step],
) -> float:
    """Return the λ, of those that the search tries, at which the mixture of draws has the least nll.

    As λ grows the draws become the adapter itself. Where that is the best there is, a warning says so.

    Args:
        data: scores the draws.
        held_out: documents that the nll is of, with their gold labels.
        scale: of the scores.
        adapter: the source.
        weights: what is drawn.
        start: λ that is tried first.
        seed: of the draws' noise, the same at every λ.
        draws: how many.
        path: gets every evaluation.
    """
    own = log_choice_probabilities(data.loglikelihoods(held_out) / data.divisors(held_out, scale))
    alone = mixture_nll(own, held_out.is_gold)
    bar = tqdm(desc="laplace: draws scored", unit="draw", leave=False)

    def nll_at(precision: float) -> float:
        posterior = KroneckerPosterior(adapter.state, weights, precision, adapter.config, {})
        try:
            mixture = mixture_of_draws(
                data, held_out, scale, posterior, search_generators(seed, draws), bar.update
            )
        except NonFiniteScoreError:  # noise so wide that the model overflows
            return math.inf
        value = mixture_nll(mixture, held_out.is_gold)
        logger.info(
            "laplace %d: prior precision %.4g, nll %.4f (adapter %.4f)",
            len(path) + 1,
            precision,
            value,
            alone,
        )
        return value

    with bar:
        precision = least(nll_at, alone, start=min(max(start, 1.0), PRECISION_RANGE[1]), path=path)
    best = min(step.value for step in path)
    if best >= alone:
        logger.warning(
            "laplace: no prior precision that was tried makes the draws' nll (%.4f) less than the adapter's (%.4f); "
            "the draws are kept near the adapter and add little",
            best,
            alone,
        )
    return precision


def _held_out(data: TaskData, count: int, sample: Documents) -> Documents:
    unseen = data.split == "training" and data.has_validation
    return data.sample(count, split="validation" if unseen else data.split, apart_from=sample)


@contextmanager
def _requiring_gradients(modules: Mapping[str, Any]) -> Iterator[None]:
    """Make the modules' weights the leaves of the graph, and afterwards what they were."""
    before = {name: module.weight.requires_grad for name, module in modules.items()}
    try:
        for module in modules.values():
            module.weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for name, module in modules.items():
            module.weight.requires_grad_(before[name])
