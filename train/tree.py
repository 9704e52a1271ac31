"""May this data set be trained on tree rows? The shared predicate and trial, asked of training's own rows and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lm_eval_lora_ensemble.train.examples import Choice, Example
from lm_eval_lora_ensemble.train.layout import Layout, as_request
from lm_eval_lora_ensemble.train.objective import ScoredHead, loglikelihoods
from lm_eval_lora_ensemble.tree.requests import TokenRequest
from lm_eval_lora_ensemble.tree.support import why_no_tree
from lm_eval_lora_ensemble.tree.trial import trial_error
from lm_eval_lora_ensemble.tree.trie import PrefixTrie

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.base import Base


def why_no_tree_rows(base: Base, examples: Sequence[Example]) -> str | None:
    """Say why a data set gets one row a choice, or None if tree rows take fewer tokens and the model may use them.

    That they are exact is for :func:`failed_trial` to show.
    """
    if tree_saving(examples) <= 1:
        return "the choices share no tokens"
    longest = max(len(as_request(choice).tokens) for example in examples for choice in example.choices)
    return why_no_tree(base.model, longest)


def failed_trial(base: Base) -> str | None:
    """Score a small tree both ways with the base model, laid out and read as in training; say so if they differ."""
    model, dtype = base.model, base.model.dtype

    def tree(requests: Sequence[TokenRequest]) -> npt.NDArray[np.float64]:
        choices = tuple(Choice((*r.tokens, 0)[: -len(r.targets)], r.targets) for r in requests)
        layout = Layout([Example("trial", 0, choices, (0,))], gold_only=False, use_tree=True, dtype=dtype)
        batch = layout.batch([[0]], layout.lengths()[0], model.device)
        lls = loglikelihoods(ScoredHead(model).logits(batch), batch)
        of_choices: npt.NDArray[np.float64] = lls[0, 0].cpu().double().numpy()  # MPS has no float64
        return of_choices

    def whole_logits(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(tokens.to(model.device), use_cache=False).logits
        return logits

    with torch.no_grad():
        error = trial_error(tree, whole_logits, model, dtype, model.get_output_embeddings().weight.shape[0])
    if error is None:
        return None
    return f"tree rows differ from whole sequences by {error:.2g} nats a token in a trial"


def tree_saving(examples: Sequence[Example]) -> float:
    """Return how many times fewer tokens tree rows take than one row a choice."""
    requests = [[as_request(choice) for choice in example.choices] for example in examples]
    chains = sum(len(request.tokens) for document in requests for request in document)
    return chains / sum(PrefixTrie(document).n_positions for document in requests)
