"""One member's forward pass over packed rows: hidden states, kept prefixes, log-probabilities at a few rows.

The decoder and the head are the model's own modules with PEFT's own layers in them, called with token ids,
depths as position ids and a 4-D mask; nothing of the arithmetic is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from lm_eval_lora_ensemble.tree.rows import PackedInput

# logits held at a time, in elements: 128 MiB of float32
_LOGITS_AT_ONCE = 1 << 25

KeyValues = dict[int, tuple[torch.Tensor, torch.Tensor]]


class PrefixCache(DynamicCache):
    """Keys and values of a prefix, put before those of every row of a batch.

    Unlike its base class it does not grow with use, so any number of batches can run on one prefix.

    Args:
        prefix: per layer the prefix's keys and values, [1, heads, P, d].
        keep: remember what each layer saw, prefix and row, in ``kept``; for the next, longer prefix.
    """

    def __init__(self, prefix: KeyValues, *, keep: bool = False) -> None:
        super().__init__()
        self._prefix = prefix
        self._keep = keep
        self.kept: KeyValues = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prefix and row keys and values of one layer, [B, heads, P + L, d]."""
        if layer_idx in self._prefix:
            keys, values = self._prefix[layer_idx]
            batch = key_states.shape[0]
            key_states = torch.cat([keys.expand(batch, -1, -1, -1), key_states], dim=2)
            value_states = torch.cat([values.expand(batch, -1, -1, -1), value_states], dim=2)
        if self._keep:
            self.kept[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the prefix's length."""
        return int(self._prefix[layer_idx][0].shape[2]) if layer_idx in self._prefix else 0


class RowLogProbs(NamedTuple):
    """What is kept of some rows' next-token distributions.

    Attributes:
        of_targets: float32 [K], log-probability of each (row, target) pair.
        top_token: int64 [R], each row's most likely token.
        top: float32 [R], its log-probability.
    """

    of_targets: npt.NDArray[np.float32]
    top_token: npt.NDArray[np.int64]
    top: npt.NDArray[np.float32]


class PackedModel:
    """A decoder-only model that can run packed rows; the active PEFT adapter is the caller's business.

    Args:
        model: ``…ForCausalLM``, wrapped by PEFT or not.
        shared_layers: so many of the lowest layers are the same for all members; their output is computed
            once a batch by :meth:`shared_hidden`.
    """

    def __init__(self, model: Any, shared_layers: int = 0) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = causal.get_decoder()
        self.head = causal.get_output_embeddings()
        self.shared_layers = shared_layers
        self.dtype: torch.dtype = causal.dtype
        self.device: torch.device = self.head.weight.device if causal.device.type == "meta" else causal.device

    @contextmanager
    def _layers(self, which: slice, *, norm: bool) -> Iterator[None]:
        """Let the decoder be only some of its layers, with or without the final norm."""
        layers, final_norm = self.decoder.layers, self.decoder.norm
        self.decoder.layers = layers[which]
        if not norm:
            self.decoder.norm = torch.nn.Identity()
        try:
            yield
        finally:
            self.decoder.layers, self.decoder.norm = layers, final_norm

    def shared_hidden(
        self, batch: PackedInput, prefix: KeyValues, *, keep: bool = False
    ) -> tuple[torch.Tensor | None, KeyValues]:
        """Run the layers that all members share; None if there are none.

        Returns:
            Hidden states [B, L, d], and with ``keep`` those layers' keys and values.
        """
        if not self.shared_layers:
            return None, {}
        with self._layers(slice(self.shared_layers), norm=False):
            return self._run(batch, prefix, keep=keep, input_ids=batch.input_ids)

    def hidden(
        self, batch: PackedInput, prefix: KeyValues, shared: torch.Tensor | None, *, keep: bool = False
    ) -> tuple[torch.Tensor, KeyValues]:
        """Run the active member.

        Args:
            batch: the rows.
            prefix: keys and values of the batch's prefix under this member; empty for none.
            shared: what :meth:`shared_hidden` returned for this batch.
            keep: return keys and values of prefix and rows together.

        Returns:
            Last hidden states [B, L, d], and the kept keys and values (empty without ``keep``).
        """
        if shared is None:
            return self._run(batch, prefix, keep=keep, input_ids=batch.input_ids)
        with self._layers(slice(self.shared_layers, None), norm=True):
            return self._run(batch, prefix, keep=keep, inputs_embeds=shared)

    def _run(
        self, batch: PackedInput, prefix: KeyValues, *, keep: bool, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, KeyValues]:
        cache = PrefixCache(prefix, keep=keep) if prefix or keep else None
        if batch.attention_mask is not None:
            # transformers takes position ids without a mask for packed sequences, so they go together
            inputs |= {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        output = self.decoder(**inputs, past_key_values=cache, use_cache=False)
        return output.last_hidden_state, cache.kept if cache is not None else {}

    def row_log_probs(
        self, hidden: torch.Tensor, pair_row: npt.NDArray[np.int64], pair_target: npt.NDArray[np.int64]
    ) -> RowLogProbs:
        """Project ``hidden`` [R, d] on the vocabulary and keep what scoring needs; float32 log-softmax.

        Args:
            hidden: last hidden states of the wanted positions.
            pair_row: int [K], row of each (row, target) pair, ascending blocks not required.
            pair_target: int [K].
        """
        at_once = max(1, _LOGITS_AT_ONCE // self.head.weight.shape[0])
        of_targets = np.empty(len(pair_row), dtype=np.float32)
        top_token = np.empty(len(hidden), dtype=np.int64)
        top = np.empty(len(hidden), dtype=np.float32)
        for start in range(0, len(hidden), at_once):
            rows = slice(start, start + at_once)
            # not logits − logsumexp, which is nearer the truth but 1e-5 nats a token from what `hf` computes
            log_probs = self.log_probs(hidden[rows])
            best = log_probs.max(dim=-1)
            top[rows], top_token[rows] = best.values.cpu(), best.indices.cpu()
            pairs = np.flatnonzero((pair_row >= start) & (pair_row < start + at_once))
            here = torch.from_numpy(pair_row[pairs] - start).to(log_probs.device)
            target = torch.from_numpy(pair_target[pairs]).to(log_probs.device)
            of_targets[pairs] = log_probs[here, target].cpu()
        return RowLogProbs(of_targets, top_token, top)

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return whole next-token distributions, float32 [R, V] log-probabilities, of a few rows."""
        return torch.log_softmax(self.head(hidden).float(), dim=-1)
