"""Attention of a pass on an accelerator: FlexAttention with the interval rule as its mask function.

One kernel skips the blocks that no query sees, so a whole stream costs one launch a layer where segments cost dozens.
It pays only compiled: uncompiled it makes the whole square of scores, which is how it is tested on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from lm_eval_lora_ensemble.scoring.attention import refuse_unknown
from lm_eval_lora_ensemble.tree.rows import TreeRow


class FlexAttention:
    """The attention function of one pass, with the interface of :class:`.attention.SegmentAttention`.

    Args:
        row: the pass.
        prefix: its first places, whose keys and values are given.
        windows: gets every sliding window that a layer asks for.
        compiled: False only where speed does not matter.
    """

    def __init__(self, row: TreeRow, prefix: int, windows: set[int], *, compiled: bool = True) -> None:
        self.row = row
        self.prefix = prefix
        self.windows = windows
        self._kernel = _kernel(compiled)
        self._block_masks: dict[tuple[int | None, torch.device], Any] = {}

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
        """Attend as :meth:`.attention.SegmentAttention.__call__` does."""
        refuse_unknown(others, attention_mask)
        if sliding_window is not None:
            self.windows.add(sliding_window)
        output = self._kernel(
            query,
            key,
            value,
            block_mask=self._block_mask(sliding_window, query.device),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2).contiguous(), None

    def _block_mask(self, window: int | None, device: torch.device) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        if (window, device) not in self._block_masks:
            computed = len(self.row) - self.prefix
            rule = interval_rule(self.row, self.prefix, window, device)
            self._block_masks[window, device] = create_block_mask(
                rule, None, None, computed, len(self.row), device=str(device)
            )
        return self._block_masks[window, device]


def interval_rule(
    row: TreeRow, prefix: int, window: int | None, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return FlexAttention's mask function: query ``q_idx`` (counted behind the prefix) sees key ``kv_idx``."""
    end = torch.from_numpy(row.end).to(device)
    positions = torch.from_numpy(row.positions).to(device)

    def sees(_b: torch.Tensor, _h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        q = q_idx + prefix
        ancestor = (kv_idx <= q) & (q < end[kv_idx])
        return ancestor if window is None else ancestor & (positions[q] - positions[kv_idx] < window)

    return sees


@cache
def _kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # the lengths of passes differ; a kernel for each would be compiled again and again
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
