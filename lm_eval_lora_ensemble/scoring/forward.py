"""One member's forward pass over tree rows: hidden states, kept prefixes, log-probabilities at a few positions.

The decoder and the head are the model's own modules with PEFT's own layers in them, called with token ids, position
ids and an additive 4-D mask; nothing of the arithmetic is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from lm_eval_lora_ensemble.tree.rows import RowBatch

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
        """Return the prefix's length; a member's own cache lacks the layers that all members share."""
        keys = self._prefix.get(layer_idx) or next(iter(self._prefix.values()), None)
        return 0 if keys is None else int(keys[0].shape[2])


class PackedRows(NamedTuple):
    """Rows ready to run on a prefix of P tokens.

    Attributes:
        rows: input and position ids [R, L].
        attention_mask: additive [R, 1, L, P + L] in the model's dtype, or None for chains on no prefix, which need
            nothing but causality.
        prefix: P.
    """

    rows: RowBatch
    attention_mask: torch.Tensor | None
    prefix: int

    @property
    def n_computed(self) -> int:
        """Token positions this batch computes, padding included."""
        return self.rows.input_ids.numel()

    @property
    def n_attended(self) -> int:
        """(query, key) pairs that attention computes in a layer, masked ones included."""
        return self.n_computed * (self.prefix + self.rows.input_ids.shape[1])


class PositionLogProbs(NamedTuple):
    """What is kept of some positions' next-token distributions.

    Attributes:
        of_targets: float32 [K], log-probability of each (position, target) pair.
        top_token: int64 [R], each position's most likely token.
        top: float32 [R], its log-probability.
    """

    of_targets: npt.NDArray[np.float32]
    top_token: npt.NDArray[np.int64]
    top: npt.NDArray[np.float32]


class PackedModel:
    """A decoder-only model that can run tree rows; the active PEFT adapter is the caller's business.

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
        # Gemma 2 caps its logits after the head, outside of it
        self._softcap: float | None = getattr(
            causal.config.get_text_config(), "final_logit_softcapping", None
        )
        # transformers 5.24 renames the decoder's argument; 5.40 drops the old name
        renamed = "cache" in inspect.signature(self.decoder.forward).parameters
        self._cache_argument = "cache" if renamed else "past_key_values"
        self._layers_return_tuples = False

    def pack(self, rows: RowBatch, prefix: int, *, chains: bool) -> PackedRows:
        """Bring rows to the model's device and make their mask there.

        Args:
            rows: the rows, padded.
            prefix: tokens of the kept prefix they run on.
            chains: every row is an ordinary sequence.
        """
        here = rows.to(self.device)
        mask = None if chains and not prefix else here.attention_mask(self.dtype, prefix)
        return PackedRows(here, mask, prefix)

    def shared_hidden(
        self, batch: PackedRows, prefix: KeyValues, *, keep: bool = False
    ) -> tuple[torch.Tensor | None, KeyValues]:
        """Run the layers that all members share; None if there are none.

        Returns:
            What enters the first layer that members do not share, [R, L, d], and with ``keep`` the shared layers'
            keys and values.
        """
        if not self.shared_layers:
            return None, {}
        layers = self.decoder.layers
        entering: list[torch.Tensor] = []
        with ExitStack() as undo:
            undo.enter_context(_observed(layers[0], self._note_kind_of_output))
            undo.enter_context(_entered(layers[self.shared_layers], entering.append))
            for layer in layers[self.shared_layers :]:
                undo.enter_context(self._skipped(layer))
            _, kept = self._run(batch, prefix, keep=keep)
        return entering[0], kept

    def hidden(
        self, batch: PackedRows, prefix: KeyValues, shared: torch.Tensor | None, *, keep: bool = False
    ) -> tuple[torch.Tensor, KeyValues]:
        """Run the active member.

        Args:
            batch: the rows.
            prefix: keys and values of the batch's prefix under this member; empty for none.
            shared: what :meth:`shared_hidden` returned for this batch.
            keep: return keys and values of prefix and rows together.

        Returns:
            Last hidden states [R, L, d], and the kept keys and values (empty without ``keep``).
        """
        if shared is None:
            return self._run(batch, prefix, keep=keep)
        # every layer keeps its place in the loop, since models look up masks and rotary embeddings by it
        with ExitStack() as undo:
            for layer in self.decoder.layers[: self.shared_layers]:
                undo.enter_context(self._skipped(layer))
            undo.enter_context(_entered(self.decoder.layers[self.shared_layers], lambda _: shared))
            return self._run(batch, prefix, keep=keep)

    def _run(self, batch: PackedRows, prefix: KeyValues, *, keep: bool) -> tuple[torch.Tensor, KeyValues]:
        cache = PrefixCache(prefix, keep=keep) if prefix or keep else None
        inputs = {"input_ids": batch.rows.input_ids}
        if batch.attention_mask is not None:
            # transformers takes position ids without a mask for packed sequences, so they go together
            inputs |= {"attention_mask": batch.attention_mask, "position_ids": batch.rows.position_ids}
        output = self.decoder(**inputs, **{self._cache_argument: cache}, use_cache=False)
        return output.last_hidden_state, cache.kept if cache is not None else {}

    def _note_kind_of_output(self, output: Any) -> None:
        self._layers_return_tuples = isinstance(output, tuple)

    @contextmanager
    def _skipped(self, layer: torch.nn.Module) -> Iterator[None]:
        """Let a decoder layer hand on its input untouched."""

        def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            return (hidden_states,) if self._layers_return_tuples else hidden_states

        own = layer.__dict__.get("forward")  # accelerate puts one there
        layer.forward = forward
        try:
            yield
        finally:
            if own is None:
                del layer.forward
            else:
                layer.forward = own

    def log_probs_at(
        self, hidden: torch.Tensor, pair_position: npt.NDArray[np.int64], pair_target: npt.NDArray[np.int64]
    ) -> PositionLogProbs:
        """Project ``hidden`` [R, d] on the vocabulary and keep what scoring needs; float32 log-softmax.

        Args:
            hidden: last hidden states of the wanted positions.
            pair_position: int [K], index into ``hidden`` of each (position, target) pair.
            pair_target: int [K].
        """
        at_once = max(1, _LOGITS_AT_ONCE // self.head.weight.shape[0])
        of_targets = np.empty(len(pair_position), dtype=np.float32)
        top_token = np.empty(len(hidden), dtype=np.int64)
        top = np.empty(len(hidden), dtype=np.float32)
        for start in range(0, len(hidden), at_once):
            block = slice(start, start + at_once)
            # not logits − logsumexp, which is nearer the truth but 1e-5 nats a token from what `hf` computes
            log_probs = self.log_probs(hidden[block])
            best = log_probs.max(dim=-1)
            top[block], top_token[block] = best.values.cpu(), best.indices.cpu()
            pairs = np.flatnonzero((pair_position >= start) & (pair_position < start + at_once))
            here = torch.from_numpy(pair_position[pairs] - start).to(log_probs.device)
            target = torch.from_numpy(pair_target[pairs]).to(log_probs.device)
            of_targets[pairs] = log_probs[here, target].cpu()
        return PositionLogProbs(of_targets, top_token, top)

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return whole next-token distributions, float32 [R, V] log-probabilities, of a few positions."""
        logits = self.head(hidden)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return torch.log_softmax(logits.float(), dim=-1)


@contextmanager
def _entered(layer: torch.nn.Module, see: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Show ``see`` the hidden states that enter a layer; what it returns, if anything, enters in their place."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            replaced = see(args[0])
            return ((args[0] if replaced is None else replaced), *args[1:]), kwargs
        replaced = see(kwargs["hidden_states"])
        return args, kwargs if replaced is None else {**kwargs, "hidden_states": replaced}

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _observed(layer: torch.nn.Module, see: Callable[[Any], None]) -> Iterator[None]:
    """Show ``see`` what a layer returns."""
    handle = layer.register_forward_hook(lambda _module, _inputs, output: see(output))
    try:
        yield
    finally:
        handle.remove()


def shared_layers(model: Any) -> int:
    """Return how many of the lowest decoder layers no adapter touches; 0 where that cannot be told.

    Members share what these layers compute. A base model with one member gains nothing and gets 0.
    """
    if len(getattr(model, "peft_config", {})) < 2:
        return 0
    layers = getattr(model.get_base_model().get_decoder(), "layers", None)
    if layers is None:
        return 0
    layer_parameters = {id(p) for p in layers.parameters()}
    for name, parameter in model.named_parameters():
        # an adapted embedding, or anything else outside the layers, changes their input
        if "lora_" in name and id(parameter) not in layer_parameters and "lm_head" not in name:
            return 0
    for i, layer in enumerate(layers):
        if any("lora_" in name for name, _ in layer.named_parameters()):
            return i
    return 0
