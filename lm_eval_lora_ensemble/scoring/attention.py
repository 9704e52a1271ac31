"""Attention of a pass by its segments, in place of the model's own while the pass runs.

transformers looks an attention function up by the name in the model's configuration, layer by layer, and calls it with
queries, keys and values that have the model's own projections, norms and rotary embeddings behind them. For the time of
a pass that name is one of ours. What a model asks of attention beyond scale and window (a soft-cap, sinks, a position
bias) is refused by name, and such a model keeps its own attention under one mask.

A query's parts are joined as a softmax over all its keys would: each part has its output o and the log-sum-exp l of its
scores, and o = Σ exp(l_i − l) o_i with l = log Σ exp(l_i), in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lm_eval_lora_ensemble.tree.rows import TreeRow
from lm_eval_lora_ensemble.tree.segments import Piece, Plan, Sizes, plan_segments

NAME = "lora_ensemble_segments"

# what models hand to every attention function and what changes nothing here
_WITHOUT_EFFECT = {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}

Attended = tuple[torch.Tensor, torch.Tensor]


class UnknownAttentionError(Exception):
    """A model asks for an attention that segments do not have."""


@contextmanager
def attention_in_place(decoder: Any, attend: Callable[..., tuple[torch.Tensor, None]]) -> Iterator[None]:
    """Let a decoder's layers call ``attend`` until the context ends."""
    config = decoder.config
    own = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attend
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        del ALL_ATTENTION_FUNCTIONS[NAME]


@dataclass
class SegmentAttention:
    """The attention function of one pass, the same for all its members and layers.

    Args:
        row: the pass.
        prefix: its first places, whose keys and values are given.
        sizes: of the pieces.
        windows: gets every sliding window that a layer asks for.
    """

    row: TreeRow
    prefix: int
    sizes: Sizes
    windows: set[int] = field(default_factory=set)
    _plans: dict[int | None, Plan] = field(default_factory=dict)
    _placed: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def plan(self, window: int | None) -> Plan:
        """Return the pieces of a layer with this sliding window."""
        if window is not None and int(self.row.positions.max(initial=0)) < window:
            window = None
        if window not in self._plans:
            self._plans[window] = plan_segments(self.row, self.prefix, window, self.sizes)
        return self._plans[window]

    def __call__(
        self,
        module: torch.nn.Module,  # noqa: ARG002 - transformers hands it over
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend as transformers' attention functions do.

        Args:
            module: the attention layer.
            query: [1, heads, T, d], of the places that are computed.
            key: [1, key heads, P + T, d], of all places.
            value: like ``key``.
            attention_mask: None; transformers makes none for a name it does not know.
            scaling: of the scores; None is ``d ** -0.5``.
            sliding_window: in positions.
            **others: what else the model asks for.

        Returns:
            [1, T, heads, d], and None for the weights.

        Raises:
            UnknownAttentionError: something of that is not done here.
        """
        refuse_unknown(others, attention_mask)
        if sliding_window is not None:
            self.windows.add(sliding_window)
        plan = self.plan(sliding_window)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        wide = torch.promote_types(query.dtype, torch.float32)
        sums = torch.empty(query.shape[:3], dtype=wide, device=query.device) if plan.above else None
        for piece in plan.own:
            here = slice(piece.first - self.prefix, piece.last - self.prefix)
            part, part_sums = self._attend(piece, query, key, value, scale, sliding_window)
            output[:, here] = part.transpose(1, 2)
            if sums is not None:
                sums[:, :, here] = part_sums
        for piece in plan.above:
            here = slice(piece.first - self.prefix, piece.last - self.prefix)
            _join(
                output[:, here].transpose(1, 2),
                sums[:, :, here],  # type: ignore[index]  # there are pieces above
                *self._attend(piece, query, key, value, scale, sliding_window),
            )
        return output, None

    def _attend(
        self,
        piece: Piece,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> Attended:
        queries = query[:, :, piece.first - self.prefix : piece.last - self.prefix]
        if len(piece.keys) == 1:
            ((first, last),) = piece.keys
            keys, values = key[:, :, first:last], value[:, :, first:last]
        else:
            # a few carried keys, copied in front of the square's own
            keys, values = (
                torch.cat([x[:, :, first:last] for first, last in piece.keys], 2) for x in (key, value)
            )
        mask = self._mask(piece, window, query) if piece.kind == "masked" else None
        return attend(queries, keys, values, scale, causal=piece.kind == "causal", mask=mask)

    def _mask(self, piece: Piece, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Return a piece's additive mask [1, 1, Q, K], made once for all layers and members."""
        name = (piece, window, like.device, like.dtype)
        if name not in self._placed:
            allowed = torch.from_numpy(visible(self.row, piece, window))
            mask = torch.zeros(allowed.shape, dtype=like.dtype).masked_fill_(
                ~allowed, torch.finfo(like.dtype).min
            )
            self._placed[name] = mask.to(like.device)[None, None]
        return self._placed[name]


def visible(row: TreeRow, piece: Piece, window: int | None) -> npt.NDArray[np.bool_]:
    """Return bool [Q, K]: which keys of a piece its queries see, by the interval rule and a window."""
    keys = piece.places
    queries = np.arange(piece.first, piece.last)[:, None]
    allowed: npt.NDArray[np.bool_] = (keys <= queries) & (queries < row.end[keys])
    if window is not None:
        allowed &= row.positions[piece.first : piece.last, None] - row.positions[keys] < window
    return allowed


def refuse_unknown(others: Mapping[str, Any], attention_mask: torch.Tensor | None) -> None:
    """Refuse what a model asks of attention and segments do not have.

    Raises:
        UnknownAttentionError: it is not None.
    """
    asked = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    if attention_mask is not None:
        asked.append("a mask of its own")
    if asked:
        raise UnknownAttentionError(f"the model's attention takes {', '.join(sorted(asked))}")


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> Attended:
    """Return softmax attention and the log-sum-exp of its scores.

    Args:
        query: [1, heads, Q, d].
        key: [1, key heads, K, d]; heads are a multiple of key heads.
        value: [1, key heads, K, d'].
        scale: of the scores.
        causal: query i sees keys 0 to i; then Q = K.
        mask: additive [1, 1, Q, K].

    Returns:
        Outputs [1, heads, Q, d'], and float32 [1, heads, Q] log-sum-exps in nats.
    """
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and _KERNEL is not None:
        if (groups := query.shape[1] // key.shape[1]) > 1 and not _kernel_groups_heads():
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        found: Attended = _KERNEL(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        return found
    return attend_by_products(query, key, value, scale, causal=causal, mask=mask)


_KERNEL: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""torch's own kernel of scaled_dot_product_attention on CPUs, which would not return the log-sum-exp."""


@functools.cache
def _kernel_groups_heads() -> bool:
    """Whether the kernel lets several heads share a key head; in older torch it reads behind the last key head.

    It is tried on key heads that are followed by others in memory, so that nothing outside of that is read.
    """
    places = torch.linspace(-2, 2, 4 * 3 * 8).view(1, 4, 3, 8)
    query, key = places.flip(1), places[:, :2]
    found, _ = _KERNEL(query, key, key, 0.0, False, scale=1.0)
    expected, _ = attend_by_products(query, key, key, 1.0)
    return torch.allclose(found, expected, atol=1e-4)


def attend_by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> Attended:
    """Do what :func:`attend` does with two plain products and a float32 softmax, on any device."""
    (_, heads, n_queries, _), key_heads = query.shape, key.shape[1]
    # the heads that share a key head are one longer list of queries
    grouped = query.reshape(1, key_heads, -1, query.shape[-1])
    scores = grouped @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale)
    scores = scores.view(1, heads, n_queries, -1)
    if mask is not None:
        scores += mask
    if causal:
        hidden = torch.ones(n_queries, n_queries, dtype=torch.bool, device=query.device).triu_(1)
        scores = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    sums = scores.logsumexp(-1)
    weights = (scores - sums[..., None]).exp_().to(value.dtype)
    output = weights.view(1, key_heads, -1, key.shape[2]) @ value
    return output.view(1, heads, n_queries, -1), sums


def _join(output: torch.Tensor, sums: torch.Tensor, part: torch.Tensor, part_sums: torch.Tensor) -> None:
    """Add a part's keys to an output [1, heads, Q, d] and its log-sum-exps [1, heads, Q], in place."""
    part_sums = part_sums.to(sums.dtype)
    both = torch.logaddexp(sums, part_sums)
    share = (part_sums - both).exp_()[..., None]
    # o + (p − o) · share, in float32 at least: shares of one key set and of the other add up to one
    output.copy_(torch.lerp(output.to(share.dtype), part.to(share.dtype), share))
    sums.copy_(both)
