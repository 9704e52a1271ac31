"""The head: from hidden states of a few positions to what scoring needs of their next-token distributions.

Logits exist for a block of positions at a time, and each block is reduced at once, to the log-probabilities of its
targets and its most likely tokens. What is done to a block is what ``hf`` does, log-softmax over float32 logits. The
difference ``logit − logsumexp`` would be nearer the truth, and 1e-5 nats a token from ``hf`` (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]

# the vocabulary is searched for its maximum in runs of so many tokens, each by a vectorised reduction
_RUN = 128


class PositionLogProbs(NamedTuple):
    """What is kept of some positions' next-token distributions.

    Attributes:
        of_targets: float32 [K], log-probability of each (position, target) pair.
        top_token: int64 [R], each position's most likely token, the first of equals.
        top: float32 [R], its log-probability.
    """

    of_targets: npt.NDArray[np.float32]
    top_token: IntArray
    top: npt.NDArray[np.float32]


class Head:
    """A causal model's projection on the vocabulary, with what the model does to its logits.

    Args:
        causal: a transformers model.
        elements: logits held at a time.
    """

    def __init__(self, causal: Any, elements: int) -> None:
        self.project = causal.get_output_embeddings()
        self.vocabulary: int = self.project.weight.shape[0]
        self.positions_at_once = max(1, elements // self.vocabulary)
        self._buffer: torch.Tensor | None = None
        # Gemma 2 caps its logits after the head, outside of it
        self._softcap: float | None = getattr(
            causal.config.get_text_config(), "final_logit_softcapping", None
        )

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return whole next-token distributions, float32 [R, V] log-probabilities, of a few positions [R, d].

        They are valid until the next call.
        """
        logits = self._logits(hidden)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        wide = logits.float()
        # in place: a second block of logits would cost its page faults, a third of the time of all this on CPUs
        return torch.log_softmax(wide, dim=-1, out=wide)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [R, V], on CPUs in memory that the next call uses again."""
        project = self.project
        plain = (
            type(project) is torch.nn.Linear
            and getattr(project, "bias", None) is None
            and not (project._forward_hooks or project._forward_pre_hooks or hasattr(project, "_hf_hook"))
            and hidden.device.type == "cpu"
            and hidden.dtype == project.weight.dtype == torch.float32
            and torch.is_inference_mode_enabled()
            and not torch.is_autocast_enabled("cpu")
        )
        if not plain:
            logits: torch.Tensor = project(hidden)
            return logits
        if self._buffer is None or len(self._buffer) < len(hidden):
            self._buffer = hidden.new_empty(len(hidden), self.vocabulary)
        return torch.mm(hidden, project.weight.T, out=self._buffer[: len(hidden)])

    def read(self, hidden: torch.Tensor, position: IntArray, target: IntArray) -> PositionLogProbs:
        """Project positions and keep what scoring needs of each.

        Args:
            hidden: last hidden states [R, d].
            position: int [K], index into ``hidden`` of each (position, target) pair.
            target: int [K].
        """
        of_targets = np.empty(len(position), dtype=np.float32)
        top_token = np.empty(len(hidden), dtype=np.int64)
        top = np.empty(len(hidden), dtype=np.float32)
        for start, stop in blocks(len(hidden), self.positions_at_once):
            block = slice(start, stop)
            log_probs = self.log_probs(hidden[block])
            best, token = top_of(log_probs)
            top[block], top_token[block] = best.cpu().numpy(), token.cpu().numpy()
            pairs = np.flatnonzero((position >= block.start) & (position < block.stop))
            here = torch.from_numpy(position[pairs] - start).to(log_probs.device)
            chosen = log_probs[here, torch.from_numpy(target[pairs]).to(log_probs.device)]
            of_targets[pairs] = chosen.cpu().numpy()
        return PositionLogProbs(of_targets, top_token, top)


def blocks(count: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Yield the borders of equal blocks of at most ``at_once``: a small last one would be a slow product.

    Example:
        >>> list(blocks(7, 5))
        [(0, 4), (4, 7)]
    """
    size = -(-count // max(1, -(-count // at_once)))
    for start in range(0, count, max(1, size)):
        yield start, min(start + size, count)


def top_of(log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's largest value and its first place, as ``max(dim=-1)`` does.

    On CPUs ``max`` looks for value and place together, one element after another; the largest value alone is found by
    vector instructions, several times faster, and then only the run that holds it is searched.
    """
    rows, vocabulary = log_probs.shape
    if log_probs.device.type != "cpu" or vocabulary % _RUN:
        found = log_probs.max(dim=-1)
        return found.values, found.indices
    runs = log_probs.view(rows, -1, _RUN)
    best_of_run = runs.amax(-1)
    run = best_of_run.argmax(-1)
    inside = runs[torch.arange(rows), run].argmax(-1)
    return best_of_run.gather(1, run[:, None])[:, 0], run * _RUN + inside
