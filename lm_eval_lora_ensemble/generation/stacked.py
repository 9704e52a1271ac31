"""All members in one forward pass: PEFT's LoRA layers with every member's update side by side.

The rows of the members lie one behind another, [N · rows, …], so that a layer's frozen weights are read once for all
of them; each member's low-rank update is one slice of a batched product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


def why_not_stacked(model: Any, names: Sequence[str]) -> str | None:
    """Return why the adapters ``names`` cannot run side by side; None if they may, which a trial has to confirm.

    Args:
        model: a ``PeftModel``.
        names: PEFT's names of the members.
    """
    for place, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{place} is trained whole"
        if not isinstance(module, BaseTunerLayer):
            continue
        if type(module) is not lora.Linear:
            return f"{place} is PEFT's {type(module).__name__}, not its plain LoRA layer"
        if any(
            name in getattr(module, "lora_variant", {}) or getattr(module, "use_dora", {}).get(name)
            for name in names
        ):
            return f"{place} has a variant of LoRA"
        if any(name in module.lora_B and module.lora_B[name].bias is not None for name in names):
            return f"{place} has a LoRA bias"
    return None


class Stacked:
    """Every member's low-rank matrices side by side; called, it lets forward passes hold all members' rows.

    The matrices are copies, made once, as large as the adapters in the type they are computed in. Keep one for as long
    as a text takes: laying them side by side costs about a thousand small copies, too many for every token.

    Args:
        model: a ``PeftModel`` for which :func:`why_not_stacked` is None.
        names: PEFT's names of the members, in the rows' order.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self._updates = [
            (module, _Update(module, names))
            for module in model.modules()
            if type(module) is lora.Linear and any(name in module.lora_A for name in names)
        ]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Let forward passes hold all members' rows, one member's behind the other's, until the context ends."""
        changed: list[tuple[Any, Any]] = []
        try:
            for module, update in self._updates:
                changed.append((module, module.__dict__.get("forward")))
                module.forward = update
            yield
        finally:
            for module, own in changed:
                if own is None:
                    del module.forward
                else:
                    module.forward = own


class _Update:
    """``y = W x + B_m A_m x``, the scale α/r in B; a rank below the largest is filled up with zeros."""

    def __init__(self, layer: Any, names: Sequence[str]) -> None:
        self._base = layer.base_layer
        present = [name for name in names if name in layer.lora_A]
        first = layer.lora_A[present[0]].weight
        rank = max(layer.lora_A[name].weight.shape[0] for name in present)
        self._A = first.new_zeros(len(names), first.shape[1], rank)
        self._B = first.new_zeros(len(names), rank, layer.lora_B[present[0]].weight.shape[0])
        for i, name in enumerate(names):
            if name in layer.lora_A:
                A, B = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
                self._A[i, :, : A.shape[0]] = A.T
                self._B[i, : A.shape[0]] = B.T * layer.scaling[name]

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self._base(x, *args, **kwargs)
        members = len(self._A)
        update = torch.bmm(x.reshape(members, -1, x.shape[-1]).to(self._A.dtype), self._A)
        flat = y.view(members, -1, y.shape[-1])
        if y.dtype == update.dtype:
            return flat.baddbmm_(update, self._B).view(y.shape)
        return (flat + torch.bmm(update, self._B)).to(y.dtype).view(y.shape)
