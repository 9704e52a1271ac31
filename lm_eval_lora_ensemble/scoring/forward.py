"""One member's forward pass over a flat stream of tokens: hidden states, and the keys and values that are kept.

The decoder is the model's own, with PEFT's own layers in it, called with token ids and position ids. Attention is by
segments (:mod:`.attention`) where the model can be told to use it, else the model's own under one additive 4-D mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from transformers import DynamicCache

from lm_eval_lora_ensemble.scoring.attention import SegmentAttention, attention_in_place
from lm_eval_lora_ensemble.scoring.flex import FlexAttention
from lm_eval_lora_ensemble.scoring.head import Head
from lm_eval_lora_ensemble.scoring.tuning import Tuning
from lm_eval_lora_ensemble.tree.rows import RowBatch, TreeRow
from lm_eval_lora_ensemble.tree.segments import plan_segments

KeyValues = dict[int, tuple[torch.Tensor, torch.Tensor]]
Attention = Literal["flex", "segments", "masked"]


class PrefixCache(DynamicCache):
    """Keys and values of a prefix, put before those of a pass.

    Unlike its base class it does not grow with use.

    Args:
        prefix: per layer the prefix's keys and values, [1, heads, P, d].
        keep: int64 places, in prefix and pass together, whose keys and values go into ``kept``; they are the next
            pass's prefix.
    """

    def __init__(self, prefix: KeyValues, keep: torch.Tensor | None = None) -> None:
        super().__init__()
        self._prefix = prefix
        self._keep = keep
        self.kept: KeyValues = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prefix and pass keys and values of one layer, [1, heads, P + T, d]."""
        if layer_idx in self._prefix:
            keys, values = self._prefix[layer_idx]
            key_states = torch.cat([keys, key_states], dim=2)
            value_states = torch.cat([values, value_states], dim=2)
        if self._keep is not None:
            places = self._keep.to(key_states.device)
            self.kept[layer_idx] = (key_states.index_select(2, places), value_states.index_select(2, places))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the prefix's length; a member's own cache lacks the layers that all members share."""
        keys = self._prefix.get(layer_idx) or next(iter(self._prefix.values()), None)
        return 0 if keys is None else int(keys[0].shape[2])


def first_of(kept: KeyValues, length: int) -> KeyValues:
    """Return the keys and values of the first ``length`` tokens; nothing for none."""
    if not length:
        return {}
    return {layer: (keys[:, :, :length], values[:, :, :length]) for layer, (keys, values) in kept.items()}


class Stream:
    """The tokens of one pass on the model's device.

    Args:
        row: the pass, its prefix included.
        prefix: places at the row's beginning that are kept from before.
        keep: places, in the whole row, of the next pass's prefix; empty for none.
        device: of the model's embeddings.
    """

    def __init__(self, row: TreeRow, prefix: int, keep: Any, device: torch.device) -> None:
        self.row = row
        self.prefix = prefix
        self.input_ids = torch.from_numpy(row.tokens[prefix:])[None].to(device)
        self.position_ids = torch.from_numpy(row.positions[prefix:])[None].to(device)
        self.keep = torch.from_numpy(keep).to(device) if len(keep) else None


class PackedModel:
    """A decoder-only model that can run a stream of tree tokens; the active PEFT adapter is the caller's business.

    Args:
        model: ``…ForCausalLM``, wrapped by PEFT or not.
        tuning: sizes that steer and change no score.
        shared_layers: so many of the lowest layers are the same for all members; their output is computed
            once a pass by :meth:`shared_hidden`.
        attention: ``flex`` on accelerators, ``segments``, or ``masked`` for a model whose attention cannot be replaced.
    """

    def __init__(
        self, model: Any, tuning: Tuning, shared_layers: int = 0, attention: Attention = "segments"
    ) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = causal.get_decoder()
        self.head = Head(causal, tuning.logits)
        self.tuning = tuning
        self.shared_layers = shared_layers
        self.attention: Attention = attention
        self.dtype: torch.dtype = causal.dtype
        on_meta = causal.device.type == "meta"
        self.device: torch.device = self.head.project.weight.device if on_meta else causal.device
        # transformers 5.24 renames the decoder's argument; 5.40 drops the old name
        renamed = "cache" in inspect.signature(self.decoder.forward).parameters
        self._cache_argument = "cache" if renamed else "past_key_values"
        self._layers_return_tuples = False
        self._planned: SegmentAttention | FlexAttention | None = None
        # the sliding windows that the model has told its attention of, as far as passes have run
        self.windows: set[int] = set()

    def token_budget(self, asked: int | None = None) -> int:
        """Return how many tokens a pass holds: as many as are asked for, or as the tuning says.

        A masked square grows with the square of a pass, and is kept small whatever is asked for.
        """
        tokens = self.tuning.tokens if asked is None else asked
        return min(tokens, self.tuning.masked_tokens) if self.attention == "masked" else tokens

    def shared_hidden(self, stream: Stream, prefix: KeyValues) -> tuple[torch.Tensor | None, KeyValues]:
        """Run the layers that all members share; None if there are none.

        Returns:
            What enters the first layer that members do not share, [1, T, d], and what is kept of the shared layers'
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
            _, kept = self._run(stream, prefix)
        return entering[0], kept

    def hidden(
        self, stream: Stream, prefix: KeyValues, shared: torch.Tensor | None
    ) -> tuple[torch.Tensor, KeyValues]:
        """Run the active member.

        Args:
            stream: the tokens.
            prefix: keys and values of the pass's prefix under this member; empty for none.
            shared: what :meth:`shared_hidden` returned for this pass.

        Returns:
            Last hidden states [T, d], and the keys and values of the next pass's prefix.
        """
        if shared is None:
            return self._run(stream, prefix)
        # every layer keeps its place in the loop, since models look up masks and rotary embeddings by it
        with ExitStack() as undo:
            for layer in self.decoder.layers[: self.shared_layers]:
                undo.enter_context(self._skipped(layer))
            undo.enter_context(_entered(self.decoder.layers[self.shared_layers], lambda _: shared))
            return self._run(stream, prefix)

    def _run(self, stream: Stream, prefix: KeyValues) -> tuple[torch.Tensor, KeyValues]:
        cache = PrefixCache(prefix, stream.keep)
        inputs: dict[str, Any] = {"input_ids": stream.input_ids, "position_ids": stream.position_ids}
        with ExitStack() as undo:
            if self.attention == "masked":
                inputs["attention_mask"] = self._mask(stream)
            else:
                undo.enter_context(attention_in_place(self.decoder, self._attend(stream)))
            output = self.decoder(**inputs, **{self._cache_argument: cache}, use_cache=False)
        return output.last_hidden_state[0], cache.kept

    def _attend(self, stream: Stream) -> SegmentAttention | FlexAttention:
        """Return the attention of a pass; its plan and masks serve all members."""
        if self._planned is None or self._planned.row is not stream.row:
            if self.attention == "flex":
                compiled = self.device.type != "cpu"
                self._planned = FlexAttention(stream.row, stream.prefix, self.windows, compiled=compiled)
            else:
                self._planned = SegmentAttention(stream.row, stream.prefix, self.tuning.sizes, self.windows)
        return self._planned

    def n_attended(self, stream: Stream) -> int:
        """Return the (query, key) pairs of one layer without a window, masked ones included."""
        if self.attention == "masked":
            return stream.input_ids.numel() * len(stream.row)
        return plan_segments(stream.row, stream.prefix, None, self.tuning.sizes).n_pairs

    def _mask(self, stream: Stream) -> torch.Tensor:
        """Return the additive mask [1, 1, T, P + T]."""
        end = torch.from_numpy(stream.row.end)[None].to(self.device)
        nothing = torch.zeros_like(end)
        return RowBatch(nothing, nothing, end).attention_mask(self.dtype)[:, :, stream.prefix :]

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
