"""LoRA layers of N members side by side over one frozen linear layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Lineup:
    """Which members a forward pass holds, in which order, and which stream their dropout is drawn from.

    Shared by a model's stacked layers. Dropout is a pure function of member's seed, step, batch and layer: it
    needs no state to resume, and no member's stream notices the others.

    Args:
        seeds: seed of each member.
        dropout: probability of dropping an input of A.
    """

    def __init__(self, seeds: Sequence[int], dropout: float) -> None:
        self.seeds = list(seeds)
        self.dropout = dropout
        self.members = list(range(len(seeds)))
        self._stream: tuple[int, int] | None = None

    @contextmanager
    def scoring(self, members: Sequence[int]) -> Iterator[None]:
        """Let forward passes hold these members, without dropout."""
        before = self.members, self._stream
        self.members, self._stream = list(members), None
        try:
            yield
        finally:
            self.members, self._stream = before

    @contextmanager
    def training(self, members: Sequence[int], step: int, batch: int) -> Iterator[None]:
        """Let forward passes hold these members, with the dropout of this step and batch."""
        with self.scoring(members):
            self._stream = (step, batch) if self.dropout else None
            yield

    def pick(self, stacked: torch.Tensor) -> torch.Tensor:
        """Return the present members' slices of a tensor [N, …]."""
        first, count = self.members[0], len(self.members)
        if self.members == list(range(first, first + count)):
            return stacked if count == len(stacked) else stacked.narrow(0, first, count)
        return stacked.index_select(0, torch.tensor(self.members, device=stacked.device))

    def dropout_seeds(self, layer: int) -> list[int] | None:
        """Return the present members' dropout seeds for a layer, or None without dropout."""
        if self._stream is None:
            return None
        entropy = [[self.seeds[member], *self._stream, layer] for member in self.members]
        return [int(np.random.SeedSequence(e).generate_state(1, np.uint64)[0] >> 1) for e in entropy]


class StackedLoRALinear(torch.nn.Module):
    """A frozen linear layer plus every member's low-rank update: ``y = W x + s · B_m A_m dropout_m(x)``.

    The input holds the present members' rows one after another, [n · rows, L, in]; W is applied to all of
    them at once, A and B by batched products. As in PEFT, the update is computed in the adapters' type
    (float32) and the sum is rounded to the layer's.

    The output head sees scored positions alone, of which one member's documents may have more than another's.
    It is told whose they are, and applies A and B member by member: a common width would depend on the company.

    Args:
        base: the frozen layer.
        A: [N, r, in].
        B: [N, out, r].
        scaling: s, alpha / r.
        lineup: shared by all layers of the model.
        index: the layer's number, which its dropout depends on.
    """

    def __init__(
        self,
        base: torch.nn.Linear,
        A: torch.nn.Parameter,
        B: torch.nn.Parameter,
        *,
        scaling: float,
        lineup: Lineup,
        index: int,
    ) -> None:
        super().__init__()
        self.base = base
        self.A = A
        self.B = B
        self.scaling = scaling
        self.lineup = lineup
        self.index = index

    def forward(self, x: torch.Tensor, shares: Sequence[int] | None = None) -> torch.Tensor:
        """Return the layer's output, of the input's shape but for the last dimension.

        Args:
            x: [n · rows, L, in]; with ``shares`` [1, P, in].
            shares: each present member's number of rows among the P, in the members' order.
        """
        A, B = self.lineup.pick(self.A), self.lineup.pick(self.B)
        settings = self.scaling, self.lineup.dropout, self.lineup.dropout_seeds(self.index)
        if shares is None:
            members = (len(A), -1)
            y = _AddLoRA.apply(
                self.base(x).view(*members, B.shape[1]), x.reshape(*members, A.shape[2]), A, B, *settings
            )
        else:
            y = _AddLoRAToShares.apply(self.base(x), x, A, B, *settings, shares)
        return y.view(*x.shape[:-1], -1)


class _AddLoRA(torch.autograd.Function):
    """``y += s · (dropout(x) Aᵀ) Bᵀ`` for stacked members, keeping only x and x Aᵀ for the backward pass.

    Autograd would keep a float32 copy of x and a dropout mask for every layer; here the copy is made anew
    and the mask drawn anew from its seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
        dropout: float,
        seeds: list[int] | None,
    ) -> torch.Tensor:
        ctx.settings = {"scaling": scaling, "dropout": dropout, "seeds": seeds}
        xa = _add_update(y, x, A, B, **ctx.settings)
        ctx.save_for_backward(x, xa, A, B)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        of_inputs = _gradients(grad, *ctx.saved_tensors, **ctx.settings, of_x=ctx.needs_input_grad[1])
        return grad, *of_inputs, None, None, None


class _AddLoRAToShares(torch.autograd.Function):
    """:class:`_AddLoRA` where members have different numbers of rows, y and x being [1, P, …].

    Every member's products have the shape that they have when it trains alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float,
        dropout: float,
        seeds: list[int] | None,
        shares: Sequence[int],
    ) -> torch.Tensor:
        streams = [[seed] for seed in seeds] if seeds else [None] * len(A)
        ctx.settings = [{"scaling": scaling, "dropout": dropout, "seeds": stream} for stream in streams]
        ctx.shares = list(shares)
        of_members = zip(_by_member([y, x], [A, B], ctx.shares), ctx.settings, strict=True)
        xa = torch.cat([_add_update(*tensors, **settings) for tensors, settings in of_members], dim=1)
        ctx.save_for_backward(x, xa, A, B)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        x, xa, A, B = ctx.saved_tensors
        of_x = ctx.needs_input_grad[1]
        of_members = zip(_by_member([grad, x, xa], [A, B], ctx.shares), ctx.settings, strict=True)
        parts = [_gradients(*tensors, **settings, of_x=of_x) for tensors, settings in of_members]
        grads_x, grads_A, grads_B = zip(*parts, strict=True)
        grad_x = torch.cat(grads_x, dim=1) if of_x else None
        return grad, grad_x, torch.cat(grads_A), torch.cat(grads_B), None, None, None, None


def _by_member(
    rows: Sequence[torch.Tensor], matrices: Sequence[torch.Tensor], shares: list[int]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield each member's own rows of [1, P, …] and matrices of [n, …]: views with a leading 1."""
    parts = [tensor.split(shares, dim=1) for tensor in rows] + [tensor.split(1) for tensor in matrices]
    return zip(*parts, strict=True)


def _add_update(
    y: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    scaling: float,
    dropout: float,
    seeds: list[int] | None,
) -> torch.Tensor:
    """Add the update to y [n, tokens, out] in place, and return x Aᵀ [n, tokens, r]."""
    xa = torch.bmm(_dropped(x.to(A.dtype), dropout, seeds), A.mT)
    if y.dtype == A.dtype:
        y.baddbmm_(xa, B.mT, alpha=scaling)
    else:
        y.add_(torch.bmm(xa, B.mT), alpha=scaling)
    return xa


def _gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    xa: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    scaling: float,
    dropout: float,
    seeds: list[int] | None,
    of_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return what the update contributes to the gradients of x (None without ``of_x``), and those of A and B."""
    scaled = grad.to(A.dtype) * scaling
    grad_B = torch.bmm(scaled.mT, xa)
    grad_xa = torch.bmm(scaled, B)
    grad_A = torch.bmm(grad_xa.mT, _dropped(x.to(A.dtype), dropout, seeds))
    grad_x = _dropped(torch.bmm(grad_xa, A), dropout, seeds).to(x.dtype) if of_x else None
    return grad_x, grad_A, grad_B


def _dropped(x: torch.Tensor, probability: float, seeds: list[int] | None) -> torch.Tensor:
    """Apply dropout to [n, tokens, features], each member's mask drawn from its own seed."""
    if seeds is None:
        return x
    keep = torch.empty_like(x)
    for member, seed in enumerate(seeds):
        generator = torch.Generator(x.device).manual_seed(seed)
        keep[member].bernoulli_(1 - probability, generator=generator)
    return x * keep.div_(1 - probability)


class MemberMatrix:
    """All members' trainable numbers as one matrix, a row a member; layers see [N, …] views of its columns.

    A member's row is contiguous, so its optimiser, its gradient norm and its checkpoint are those of one flat
    parameter and run over the same memory shape however many members there are.

    Args:
        shapes: shape of each tensor of one member.
        members: N.
        device: where it lives; float32.
    """

    def __init__(self, shapes: Sequence[torch.Size], members: int, device: torch.device) -> None:
        self.shapes = list(shapes)
        columns = sum(shape.numel() for shape in shapes)
        self.values = torch.zeros(members, columns, device=device)
        self.gradients = torch.zeros_like(self.values)

    def rows(self) -> list[torch.nn.Parameter]:
        """Return each member's numbers as one flat parameter, for its optimiser."""
        return [self._tied(self.values[m], self.gradients[m]) for m in range(len(self.values))]

    def layers(self) -> list[torch.nn.Parameter]:
        """Return each tensor as a parameter [N, …]; its gradient accumulates in place."""
        parameters, start = [], 0
        for shape in self.shapes:
            columns = slice(start, start + shape.numel())
            view = (len(self.values), *shape)
            parameters.append(
                self._tied(self.values[:, columns].view(view), self.gradients[:, columns].view(view))
            )
            start = columns.stop
        return parameters

    @staticmethod
    def _tied(values: torch.Tensor, gradients: torch.Tensor) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(values)
        parameter.grad = gradients
        return parameter
