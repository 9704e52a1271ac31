"""Kronecker-factored curvature of linear maps: for each weight, a covariance of inputs and one of gradients.

The generalised Gauss–Newton matrix of scores f under a likelihood with Hessian H(f) is Σ_n J_nᵀ H_n J_n, which for a
softmax over the scores is the exact Fisher matrix: the expectation over classes is taken, no label is drawn and none is
needed. With H = Σ_k v_k v_kᵀ every v_k costs one backward pass. Of a weight W [out, in] it keeps ::

    F  ≈  G ⊗ A,     G = Σ_t Σ_k g_t,k g_t,kᵀ  [out, out],     A = (1/T) Σ_t a_t a_tᵀ  [in, in]

over the T positions t of all documents, a_t the input there and g_t,k the gradient of v_kᵀ f at the output
(KFAC-expand, arXiv 2311.00636). Three things are dropped: what couples different weights, what couples different
positions of one document, and what couples the size of a_t with that of g_t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

DENSE_LIMIT = 2048
"""Up to this size a covariance is kept whole, 8 · size² bytes; above it as ``LOW_RANK`` directions, 8 · rank · size."""
LOW_RANK = 256


@dataclass(frozen=True)
class Eigen:
    """A positive semi-definite matrix V diag(values) Vᵀ of size n, as far as it is known.

    Attributes:
        values: float64 [k], at least 0; the n − k missing ones are 0.
        vectors: float64 [n, k], orthonormal columns.
    """

    values: torch.Tensor
    vectors: torch.Tensor


@dataclass(frozen=True)
class KroneckerFactors:
    """The curvature G ⊗ A of one weight [out, in].

    Attributes:
        gradients: G, of size out.
        inputs: A, of size in.
    """

    gradients: Eigen
    inputs: Eigen

    @property
    def eigenvalues(self) -> torch.Tensor:
        """The products of the factors' eigenvalues, [k_out, k_in]; all others are 0."""
        return self.gradients.values[:, None] * self.inputs.values

    @property
    def n_weights(self) -> int:
        """Number of elements, out · in."""
        return len(self.gradients.vectors) * len(self.inputs.vectors)


class Covariance:
    """A running sum of x xᵀ over rows x, whole for small sizes and by its largest directions for large ones.

    A large one keeps Σ x xᵀ ≈ SᵀS with at most ``rank`` rows in S between additions: the rows that come are joined to
    it, and what lies outside the largest ``rank`` directions is dropped. What is dropped is curvature, so a posterior
    is wider in those directions, at most as wide as its prior.

    Args:
        size: of x.
        rank: directions kept where size is above ``dense_limit``.
        dense_limit: the largest size that is kept whole.
    """

    def __init__(self, size: int, rank: int = LOW_RANK, dense_limit: int = DENSE_LIMIT) -> None:
        self.size = size
        self.rank = rank
        self._dense = size <= dense_limit
        self._sum: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Add the outer products of ``rows`` [m, size]."""
        if not len(rows):
            return
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        # float64 for the sum: a thousand passes of float32 would lose the small eigenvalues; MPS has none
        exact = torch.float32 if rows.device.type == "mps" else torch.float64
        if self._dense:
            product = (wide.T @ wide).to(exact)
            self._sum = product if self._sum is None else self._sum.add_(product)
            return
        joined = wide.to(exact) if self._sum is None else torch.cat([self._sum, wide.to(exact)])
        self._sum = _largest_directions(joined, self.rank)

    def eigen(self, scale: float = 1.0) -> Eigen:
        """Return the eigendecomposition of ``scale`` times the sum, on the CPU."""
        if self._sum is None:
            return Eigen(torch.zeros(0).double(), torch.zeros(self.size, 0).double())
        total = self._sum.cpu().double()  # MPS has no float64
        if self._dense:
            values, vectors = torch.linalg.eigh(total)
            return Eigen(values.clamp(min=0) * scale, vectors)
        norms = total.norm(dim=1)
        kept = norms > norms.max() * 1e-7
        return Eigen(norms[kept].square() * scale, (total[kept] / norms[kept, None]).T.contiguous())


def _largest_directions(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Return at most ``rank`` orthogonal rows S with SᵀS ≈ rowsᵀ rows, exact if the rows span no more."""
    if len(rows) > rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        return (vectors * values.clamp(min=0).sqrt()).T[-rank:]
    _, vectors = torch.linalg.eigh(rows @ rows.T)
    return vectors.T[-rank:] @ rows


def root_of_softmax(scores: torch.Tensor) -> torch.Tensor:
    """Return vectors v_y with Σ_y v_y v_yᵀ = diag(p) − p pᵀ, the Fisher matrix of p = softmax(scores).

    v_y = √p_y (e_y − p): the gradient of log p_y, weighted by how probable y is.

    Args:
        scores: [D, C]; −inf for a choice that a document lacks.

    Returns:
        [C, D, C], the vectors along the first axis.
    """
    p = scores.softmax(-1)
    classes = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    return p.sqrt().T[:, :, None] * (classes[:, None, :] - p)


def kronecker_factors(
    modules: Mapping[str, torch.nn.Linear],
    passes: Iterable[torch.Tensor],
    root: Callable[[torch.Tensor], torch.Tensor] = root_of_softmax,
    *,
    rank: int = LOW_RANK,
    dense_limit: int = DENSE_LIMIT,
) -> dict[str, KroneckerFactors]:
    """Accumulate the curvature of linear modules over the documents of all passes.

    A position counts for a module if some score depends on the module's output there: the others (padding, and what
    comes too late to be seen) have no curvature, and their inputs would only dilute A.

    Args:
        modules: by name; each runs once a pass, and its weight requires a gradient.
        passes: scores [D, C], each made by a forward pass that runs when it is asked for.
        root: from scores [D, C] to vectors [K, D, C] with Σ_k v_k v_kᵀ the Hessian of the loss in a document's scores.
        rank: as in :class:`Covariance`.
        dense_limit: as in :class:`Covariance`.
    """
    inputs = {name: Covariance(module.in_features, rank, dense_limit) for name, module in modules.items()}
    gradients = {name: Covariance(module.out_features, rank, dense_limit) for name, module in modules.items()}
    positions = dict.fromkeys(modules, 0)
    with _recorded(modules) as record:
        for scores in passes:
            names = [name for name in modules if name in record]
            outputs = [record[name][1] for name in names]
            of_class = _gradients(scores, root(scores.detach()), outputs)
            for i, name in enumerate(names):
                of_output = [gradient[i].flatten(0, -2) for gradient in of_class]
                counts = torch.stack([(g != 0).any(-1) for g in of_output]).any(0)
                inputs[name].add(record[name][0].detach().flatten(0, -2)[counts])
                gradients[name].add(torch.cat([g[counts] for g in of_output]))
                positions[name] += int(counts.sum())
            record.clear()
    return {  # a sum goes as its eigenvectors come: never two matrices of every size at once
        name: KroneckerFactors(
            gradients.pop(name).eigen(), inputs.pop(name).eigen(1 / max(positions[name], 1))
        )
        for name in modules
    }


@contextmanager
def _recorded(
    modules: Mapping[str, torch.nn.Linear],
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Note each module's latest input and output, for as long as the context lasts."""
    record: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def noting(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            record[name] = inputs[0], output

        return hook

    handles = [module.register_forward_hook(noting(name)) for name, module in modules.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _gradients(
    scores: torch.Tensor, vectors: torch.Tensor, outputs: list[torch.Tensor]
) -> list[tuple[torch.Tensor, ...]]:
    """Return, for each of K vectors, the gradient of its product with the scores at every output."""
    real = torch.isfinite(scores)
    # a choice that a document lacks has score −inf: out of the graph, or its gradient 0 · inf would be NaN
    kept, weights = scores[real], vectors[:, real]
    last = len(weights) - 1
    return [
        torch.autograd.grad(kept, outputs, weight, retain_graph=k < last, materialize_grads=True)
        for k, weight in enumerate(weights)
    ]
