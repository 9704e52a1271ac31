"""Keys and values of a batch's rows: in place as they grow, dropped when done."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# tokens by which a full buffer grows: the copying that transformers' own layer does at every token, once in so many
_ROOM = 64


class GrowingLayer(DynamicLayer):
    """A layer's keys and values in buffers with room for the next tokens, [rows, heads, tokens, d]."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: list[torch.Tensor] = []
        self._length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [
                states.new_empty(*states.shape[:2], 0, states.shape[3])
                for states in (key_states, value_states)
            ]
        start, stop = self._length, self._length + key_states.shape[2]
        for i, states in enumerate((key_states, value_states)):
            if stop > self._buffers[i].shape[2]:
                grown = states.new_empty(*states.shape[:2], stop + _ROOM, states.shape[3])
                grown[:, :, :start] = self._buffers[i][:, :, :start]
                self._buffers[i] = grown
            self._buffers[i][:, :, start:stop] = states
        self._length = stop
        self._show()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows of these numbers, in this order."""
        if self._buffers:
            self._buffers = [buffer.index_select(0, beam_idx.to(buffer.device)) for buffer in self._buffers]
            self._show()

    def _show(self) -> None:
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)


def new_cache(config: Any, longest: int) -> Any:
    """Return an empty cache.

    Args:
        config: of the model.
        longest: so many tokens a row will have at most, padding included.
    """
    cache = DynamicCache(config=config)
    if all(_sees_all(layer, longest) for layer in cache.layers):
        cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


def _sees_all(layer: Any, longest: int) -> bool:
    """Whether a layer of up to ``longest`` tokens is one that attends to all of them."""
    if type(layer) is DynamicSlidingWindowLayer:
        return longest < layer.sliding_window
    return type(layer) is DynamicLayer


def keep_rows(cache: Any, rows: torch.Tensor) -> None:
    """Drop all rows of a cache but these."""
    for layer in cache.layers:
        layer.reorder_cache(rows)
