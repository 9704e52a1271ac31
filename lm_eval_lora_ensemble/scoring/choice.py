"""Which way of running passes is exact for a model: what its configuration says, then what a trial proves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from lm_eval_lora_ensemble.errors import first_line
from lm_eval_lora_ensemble.scoring.attention import UnknownAttentionError
from lm_eval_lora_ensemble.scoring.forward import Attention, PackedModel, shared_layers
from lm_eval_lora_ensemble.scoring.packed import PackedScorer
from lm_eval_lora_ensemble.scoring.tuning import Tuning, tuning_for
from lm_eval_lora_ensemble.tree.requests import TokenRequest
from lm_eval_lora_ensemble.tree.segments import Sizes
from lm_eval_lora_ensemble.tree.support import sliding_window, why_no_segments, why_no_tree
from lm_eval_lora_ensemble.tree.trial import trial_error

logger = logging.getLogger(__name__)

# passes so small, and pieces so small, that a trial of a few dozen tokens goes through every kind of both
_TRIAL_TUNING = Tuning(
    tokens=20, masked_tokens=20, logits=1 << 22, sizes=Sizes(square=6, whole=8, block=4, carried=4)
)


class PackedModels:
    """A model with each kind of attention that it has been tried with.

    Args:
        model: a causal transformers model, wrapped by PEFT or not.
        device: where passes run.
        activate: makes the member active that trials are made with.
        whole_logits: int64 [1, L] token ids to [1, L, V] logits, by the model as it is.
        autocast: the context that passes run in.
        dtype: what is computed in there, if not the model's own type.
    """

    def __init__(
        self,
        model: Any,
        *,
        device: torch.device,
        activate: Callable[[], None],
        whole_logits: Callable[[torch.Tensor], torch.Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
        dtype: torch.dtype | None,
    ) -> None:
        self._model = model
        self._device = device
        self._activate = activate
        self._whole_logits = whole_logits
        self._autocast = autocast
        self._dtype = dtype
        self._tried: dict[Attention, tuple[PackedModel, str | None]] = {}

    def choose(self, longest: int) -> PackedModel | str:
        """Return what runs passes of sequences of up to ``longest`` tokens, or why nothing does so exactly."""
        kinds: tuple[Attention, ...] = ("segments",) if self._device.type == "cpu" else ("flex", "segments")
        for attention in kinds:
            reason = (
                why_no_segments(self._model, longest)
                or self._failure(attention)
                or self._unseen_window(attention, longest)
            )
            if reason is None:
                return self._tried[attention][0]
            level = logging.WARNING if attention == "flex" else logging.INFO  # segments are slower there
            logger.log(level, "no %s attention: %s", attention, reason)
        return why_no_tree(self._model, longest) or self._failure("masked") or self._tried["masked"][0]

    def _failure(self, attention: Attention) -> str | None:
        """Return why passes with this attention are not exact here; tried once."""
        if attention not in self._tried:
            packed = PackedModel(self._model, tuning_for(self._device), shared_layers(self._model), attention)
            self._tried[attention] = packed, self._try(packed)
        return self._tried[attention][1]

    def _try(self, packed: PackedModel) -> str | None:
        small = PackedModel(self._model, _TRIAL_TUNING, packed.shared_layers, packed.attention)
        scorer = PackedScorer(
            small, lambda _: self._activate(), n_members=1, token_budget=_TRIAL_TUNING.tokens
        )

        def rows(requests: Sequence[TokenRequest]) -> list[float]:
            scores = dict(scorer.score(requests))
            return [float(scores[i].loglikelihoods[0]) for i in range(len(requests))]

        try:
            with self._autocast(), torch.inference_mode():
                error = trial_error(
                    rows,
                    self._whole_logits,
                    self._model,
                    self._dtype or packed.dtype,
                    packed.head.vocabulary,
                )
        except UnknownAttentionError as unknown:
            return str(unknown)
        except Exception as failure:
            # a compiler may fail in any way, and segments need none
            if packed.attention != "flex":
                raise
            return f"{type(failure).__name__}: {first_line(failure)}"
        packed.windows = small.windows
        if error is None:
            return None
        return f"packed rows differ from whole sequences by {error:.2g} nats a token in a trial"

    def _unseen_window(self, attention: Attention, longest: int) -> str | None:
        """Say so if a sliding window is in reach and the model's attention is not told of it."""
        window = sliding_window(self._model)
        if window is None or longest <= window or window in self._tried[attention][0].windows:
            return None
        return f"the model's attention is not told of its sliding window of {window}"
