"""Kronecker factors against matrices that are built whole, and the Gaussian that they make."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from lm_eval_lora_ensemble.posterior.gaussian import (
    KroneckerPosterior,
    UncertainWeight,
    log_evidence,
    marginal_likelihood_precision,
)
from lm_eval_lora_ensemble.posterior.kfac import (
    Covariance,
    Eigen,
    KroneckerFactors,
    kronecker_factors,
    root_of_softmax,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(eigen: Eigen) -> np.ndarray:
    return (eigen.vectors * eigen.values @ eigen.vectors.T).numpy()


def kron(factors: KroneckerFactors) -> np.ndarray:
    """The curvature of a weight [out, in] whose elements lie row by row, as numpy and torch flatten it."""
    return np.kron(whole(factors.gradients), whole(factors.inputs))


@pytest.mark.parametrize(("limit", "rank"), [(64, 4), (2, 12)])
def test_a_covariance_is_exact_whole_or_where_the_rows_span_no_more_than_it_keeps(limit, rank):
    parts = [normal(30, 7) @ normal(7, 20, seed=1), normal(3, 7, seed=2) @ normal(7, 20, seed=1)]
    covariance = Covariance(20, rank=rank, dense_limit=limit)
    for part in parts:
        covariance.add(part)
    covariance.add(torch.empty(0, 20))
    rows = torch.cat(parts)
    eigen = covariance.eigen(0.5)
    assert whole(eigen) == pytest.approx((rows.T @ rows / 2).numpy(), abs=1e-9)
    assert torch.allclose(
        eigen.vectors.T @ eigen.vectors, torch.eye(eigen.vectors.shape[1]).double(), atol=1e-9
    )


def test_a_large_covariance_keeps_its_largest_directions_and_invents_none():
    rows = normal(50, 30) * torch.logspace(1, -3, 30, dtype=torch.float64)
    covariance = Covariance(30, rank=10, dense_limit=2)
    for part in rows.split(7):
        covariance.add(part)
    true = rows.T @ rows
    kept = torch.from_numpy(whole(covariance.eigen()))
    assert len(covariance.eigen().values) == 10
    assert torch.linalg.eigvalsh(true - kept).min() > -1e-9 * torch.linalg.eigvalsh(true).max()
    assert torch.linalg.matrix_norm(true - kept) < 0.05 * torch.linalg.matrix_norm(true)


def test_nothing_added_is_no_curvature():
    eigen = Covariance(5).eigen()
    assert eigen.vectors.shape == (5, 0)


def test_the_root_of_the_softmax_is_its_fisher_matrix():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.1], [5.0, 1.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    root = root_of_softmax(scores)
    p = scores.softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert torch.allclose(torch.einsum("kdi,kdj->dij", root, root), fisher, atol=1e-12)


def block_of(scores_of, module: torch.nn.Linear, half: torch.Tensor) -> np.ndarray:
    """One weight's block of Σ_n J_nᵀ H J_n with H = half halfᵀ, from whole Jacobians of the scores [D, C]."""
    own = module.weight.detach().clone()

    def of_weight(weight):
        return scores_of({id(module): weight})

    jacobian = torch.autograd.functional.jacobian(of_weight, own).flatten(2)  # [D, C, P]
    return sum(j.T @ half @ half.T @ j for j in jacobian).numpy()


def test_factors_are_the_exact_blocks_of_a_deep_linear_network():
    """Exact, because one position a datum, a Gaussian likelihood, and gradients that are the same for every datum.

    A linear network's Jacobian to each layer's output does not depend on the input, nor does the Hessian of a squared
    error. So Σ_n g gᵀ ⊗ a_n a_nᵀ splits into a factor of each. With a softmax, whose Hessian depends on the scores, it
    would not.
    """
    sizes = (5, 4, 6, 3)
    modules = {
        f"layer{i}": torch.nn.Linear(n_in, n_out, bias=False, dtype=torch.float64)
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    }
    for i, module in enumerate(modules.values()):
        module.weight.data = normal(*module.weight.shape, seed=i)
    x = normal(9, 5, seed=7)
    half = torch.linalg.cholesky(torch.eye(3, dtype=torch.float64) + 0.3)

    def forward(x):
        for module in modules.values():
            x = module(x)
        return x

    def scores_of(replaced):
        y = x
        for module in modules.values():
            y = y @ replaced.get(id(module), module.weight.detach()).T
        return y

    passes = (forward(part) for part in x.split(4))
    root = lambda scores: half.T[:, None, :].expand(3, len(scores), 3)  # noqa: E731
    factors = kronecker_factors(modules, passes, root)
    for name, module in modules.items():
        exact = block_of(scores_of, module, half)
        assert np.abs(exact).max() > 1
        assert kron(factors[name]) == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_one_datum_of_one_position_is_exact_for_any_network_and_likelihood():
    """With one term in the sum over data and positions there is nothing that the factors could average apart."""
    first = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
    last = torch.nn.Linear(3, 5, bias=False, dtype=torch.float64)
    first.weight.data, last.weight.data = normal(3, 4), normal(5, 3, seed=1)
    x = normal(1, 4, seed=2)
    factors = kronecker_factors({"first": first, "last": last}, _one(first, last, x))
    scores = last(first(x).tanh()).detach()
    half = root_of_softmax(scores)[:, 0].T

    def scores_of(replaced):
        hidden = (x @ replaced.get(id(first), first.weight.detach()).T).tanh()
        return hidden @ replaced.get(id(last), last.weight.detach()).T

    for name, module in {"first": first, "last": last}.items():
        assert kron(factors[name]) == pytest.approx(block_of(scores_of, module, half), rel=1e-9, abs=1e-12)


def _one(first, last, x):
    yield last(first(x).tanh())


def test_padding_and_choices_that_are_not_there_change_nothing():
    module = torch.nn.Linear(3, 2, bias=False, dtype=torch.float64)
    x = normal(2, 4, 3)

    def passes(padded):
        shown = torch.cat([x, 100 + normal(2, 3, 3, seed=9)], dim=1) if padded else x
        scores = module(shown)[:, :4].sum(1)
        yield torch.cat([scores, torch.full((2, 1), -torch.inf)], dim=1) if padded else scores

    plain, padded = (kronecker_factors({"m": module}, passes(flag))["m"] for flag in (False, True))
    assert kron(padded) == pytest.approx(kron(plain), rel=1e-12)
    assert np.abs(kron(plain)).max() > 0.01


def weight_of(
    out: int = 3, width: int = 4, *, known: int | None = None, count: float = 2.0, seed: int = 0
) -> UncertainWeight:
    """A weight with random factors, of which only the largest ``known`` directions of the inputs are kept."""
    rows = {"gradients": normal(20, out, seed=seed), "inputs": normal(20, width, seed=seed + 1)}
    eigens = {}
    for name, part in rows.items():
        covariance = Covariance(
            part.shape[1], rank=known or 9, dense_limit=2 if known and name == "inputs" else 99
        )
        covariance.add(part)
        eigens[name] = covariance.eigen(1 / 20)
    return UncertainWeight(normal(out, width, seed=seed + 2), KroneckerFactors(**eigens), count)


@pytest.mark.parametrize("known", [None, 2])
def test_mean_and_covariance_of_draws_are_the_declared_ones(known):
    """Whitened by the inverse built whole; chi-square of all, of the means, and the largest of 66 correlations.

    4000 draws; together wrong for one seed in 1000, and the seed is fixed.
    """
    weight, precision, n = weight_of(known=known), 0.7, 4000
    posterior = KroneckerPosterior({"other": torch.ones(2)}, {"w": weight}, precision, {}, {})
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack([posterior.draw(generator)["w"] for _ in range(n)]).double().flatten(1).numpy()
    whole_precision = 2.0 * kron(weight.factors) + precision * np.eye(12)
    white = (draws - weight.mean.flatten().numpy()) @ np.linalg.cholesky(whole_precision)
    error_rate = 1e-3
    low, high = stats.chi2.ppf([error_rate / 6, 1 - error_rate / 6], white.size)
    assert low < (white**2).sum() < high
    assert n * (white.mean(0) ** 2).sum() < stats.chi2.ppf(1 - error_rate / 3, 12)
    correlations = (white.T @ white / math.sqrt(n))[np.triu_indices(12, 1)]
    assert np.abs(correlations).max() < stats.norm.ppf(1 - error_rate / 6 / len(correlations))


def test_draws_leave_other_tensors_and_the_source_alone():
    state = {"a": torch.ones(2, dtype=torch.bfloat16), "w": torch.zeros(3, 4)}
    posterior = KroneckerPosterior(state, {"w": weight_of()}, 1.0, {}, {})
    one, again, other = (posterior.draw(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one["w"], again["w"])
    assert not torch.equal(one["w"], other["w"])
    assert torch.equal(one["a"], torch.ones(2))
    one["a"].zero_()
    assert state["a"].sum() == 2
    assert not state["w"].any()


def test_a_linear_gaussian_model_has_its_closed_form_posterior_and_evidence():
    """Bayesian linear regression y = W x + ε, ε ~ N(0, I): here Laplace's approximation is no approximation."""
    x, y, precision = normal(15, 4), normal(15, 2, seed=1), 0.8
    gram = x.T @ x
    mode = torch.linalg.solve(gram + precision * torch.eye(4).double(), x.T @ y).T  # [out, in]
    module = torch.nn.Linear(4, 2, bias=False, dtype=torch.float64)
    module.weight.data = mode
    eye = torch.eye(2, dtype=torch.float64)
    factors = kronecker_factors(
        {"w": module},
        (module(part) for part in x.split(5)),
        lambda scores: eye[:, None, :].expand(2, len(scores), 2),
    )
    weight = UncertainWeight(mode, factors["w"])
    closed = np.linalg.inv(np.kron(np.eye(2), gram.numpy() + precision * np.eye(4)))
    assert np.linalg.inv(kron(weight.factors) + precision * np.eye(8)) == pytest.approx(
        closed, rel=1e-9, abs=1e-12
    )
    marginal = stats.multivariate_normal(cov=(x @ x.T / precision).numpy() + np.eye(15))
    exact = sum(marginal.logpdf(column) for column in y.T.numpy())
    fit = stats.norm.logpdf((y - x @ mode.T).numpy()).sum()
    assert fit + log_evidence([weight], precision) == pytest.approx(exact, rel=1e-10)


def test_the_prior_precision_is_that_of_brute_force():
    weights = [
        weight_of(seed=0, count=50.0),
        weight_of(5, 3, seed=10, count=9.0),
        weight_of(known=2, seed=20),
    ]

    def evidence(t):
        """log N(θ; 0, I/λ) − ½ log det of the posterior's precision, on matrices built whole."""
        total = 0.0
        for weight in weights:
            size = weight.mean.numel()
            precision = weight.count * kron(weight.factors) + math.exp(t) * np.eye(size)
            total += (
                size * t - math.exp(t) * float(weight.mean.square().sum()) - np.linalg.slogdet(precision)[1]
            )
        return total / 2

    for t in (-3.0, 0.2, 4.0):
        assert log_evidence(weights, math.exp(t)) == pytest.approx(evidence(t), rel=1e-9)
    grid = np.linspace(-10, 10, 400)
    best = grid[np.argmax([evidence(t) for t in grid])]
    brute = optimize.minimize_scalar(
        lambda t: -evidence(t), bounds=(best - 0.1, best + 0.1), method="bounded"
    )
    assert math.log(marginal_likelihood_precision(weights)) == pytest.approx(brute.x, abs=1e-4)
