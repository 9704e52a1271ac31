"""The trial: a small random tree scored as rows and as whole sequences, on the model at hand.

It catches what no configuration tells: logits scaled or capped after the head, positions that do not come from
``position_ids``, layers that mix tokens by other means than attention, a mask that is added where it should select.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lm_eval_lora_ensemble.tree.requests import TokenRequest

TreeScorer = Callable[[Sequence[TokenRequest]], Sequence[float] | npt.NDArray[np.float64]]
WholeLogits = Callable[[torch.Tensor], torch.Tensor]

# nats a token: two orders of the same float32 operations differ by less than 1e-5 on short sequences
_FULL_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
# in half precision: how many times as far from a float32 pass as whole sequences are, root mean square over the tokens.
# Two exact orders of the same operations are equally far; measured: 1.0 on tiny models, 0.7 to 1.2 on a real one.
_HALF_FACTOR = 2.0
_HALF_LEAST = 1e-4


def trial_error(
    tree: TreeScorer, whole_logits: WholeLogits, model: torch.nn.Module, dtype: torch.dtype, vocabulary: int
) -> float | None:
    """Score a small tree both ways and return the largest difference of a token, in nats, if it is too large.

    In float32 and float64 the two ways are compared with each other. In half precision both are compared with a
    float32 pass of whole sequences, so what is allowed follows from what that type does to this model.

    Args:
        tree: requests to their loglikelihoods, computed from tree rows.
        whole_logits: int64 [1, L] token ids to [1, L, V] logits, by the model as it is.
        model: what ``whole_logits`` runs; its half-precision weights are widened for the float32 pass, then restored.
        dtype: what the model computes in.
        vocabulary: number of tokens V.
    """
    sequences, requests = _small_tree(vocabulary)
    rows = np.asarray(tree(requests), dtype=np.float64)
    if not np.isfinite(rows).all():
        return None  # broken weights, not a wrong mask: scoring itself names the member, which whole sequences may hide
    whole = np.concatenate([_token_log_probs(whole_logits, sequence) for sequence in sequences])
    if dtype in _FULL_TOLERANCE:
        worst = float(np.abs(rows - whole).max())
        return None if worst <= _FULL_TOLERANCE[dtype] else worst
    with in_float32(model):
        exact = np.concatenate([_token_log_probs(whole_logits, sequence) for sequence in sequences])
    allowed = max(_HALF_FACTOR * _root_mean_square(whole - exact), _HALF_LEAST)
    return None if _root_mean_square(rows - exact) <= allowed else float(np.abs(rows - exact).max())


def _root_mean_square(errors: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def _small_tree(vocabulary: int) -> tuple[list[tuple[int, ...]], list[TokenRequest]]:
    """Return five sequences that share and nest prefixes, and a request for every token of each but its first."""
    draw = np.random.default_rng(0).integers(0, vocabulary, size=(5, 8)).tolist()
    stem, one, other, third, fourth = (tuple(part) for part in draw)
    sequences = [
        stem + one,
        stem + one[:3] + other,
        stem + third,
        stem + third[:5] + fourth,
        stem[:3] + fourth,
    ]
    return sequences, [TokenRequest(s[:i], (s[i],)) for s in sequences for i in range(1, len(s))]


def _token_log_probs(whole_logits: WholeLogits, sequence: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return the log-probability of every token but the first, float64 [L - 1]."""
    logits = whole_logits(torch.tensor([sequence[:-1]]))[0].float()
    log_probs = torch.log_softmax(logits, dim=-1).cpu()
    chosen = log_probs[range(len(sequence) - 1), list(sequence[1:])]
    found: npt.NDArray[np.float64] = chosen.double().numpy()
    return found


@contextmanager
def in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Let every module with half-precision weights of its own compute in float32, one module's weights at a time.

    Widening is exact, and the very same tensors are put back after each module, so nothing is left changed and the
    memory needed is that of the largest layer. Weights that are quantised, or that accelerate keeps elsewhere, stay
    as they are; so do float32 adapters.
    """
    handles: list[Any] = []
    kept: dict[torch.nn.Module, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}

    def widen(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        own = [p for p in module.parameters(recurse=False) if p.dtype in (torch.bfloat16, torch.float16)]
        kept[module] = [(p, p.data) for p in own if p.device.type != "meta"]
        for parameter, data in kept[module]:
            parameter.data = data.float()
        return tuple(_widened(value) for value in inputs)

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for parameter, data in kept.pop(module, ()):
            parameter.data = data

    try:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(widen))
                handles.append(module.register_forward_hook(restore, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(kept):
            restore(module)


def _widened(value: Any) -> Any:
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
