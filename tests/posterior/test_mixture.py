from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from monteclora.posterior import dirichlet, mixture, wishart
from tests import reference
from tests.posterior import formulas
from tests.posterior.building import LAWS, reference_statistics, statistics
from tests.posterior.checks import COUNT, SEEDS, assert_law, assert_mean
from tests.reference import Law, name_of


def collapsed(law: Law, seed: int, count: int = COUNT) -> Tensor:
    """``A - mu``, shape (count, r, n), in float64: each draw one call of ``formulas.draw``."""
    generator = torch.Generator().manual_seed(seed)
    rho = torch.tensor(law.rho, dtype=torch.float64).expand(count, -1)
    eta = torch.tensor(law.alpha, dtype=torch.float64).log().expand(count, -1).contiguous()
    if law.full:
        raw = wishart.raw_bartlett(law.dof, len(law.rho), count, rho, generator)
    else:
        raw = wishart.raw_chi_square(torch.full_like(rho, law.dof), generator)
    factor = formulas.wishart_factor(rho, raw, law.dof, normalised=law.normalised)
    pi = formulas.weights(eta, dirichlet.raw(eta, "laplace" if law.laplace else "exact", generator))
    xi = torch.randn(count, len(law.rho), law.columns, dtype=torch.float64, generator=generator)
    mu = torch.full((len(law.rho), law.columns), 0.25, dtype=torch.float64)
    return torch.vmap(formulas.draw, in_dims=(None, None, 0, 0, 0))(mu, law.scale, pi, factor, xi) - mu


# -- the collapsed draw against the N-draw sampler -----------------------------------------------------------------


def check_collapse(law: Law, seed: int, drawn: Law | None = None) -> None:
    actual = statistics(collapsed(drawn or law, seed).numpy())
    for name, expected in reference_statistics(law).items():
        assert_law(actual[name], expected, name)


@pytest.mark.parametrize("law", LAWS, ids=name_of)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_collapsed_draw_has_the_law_of_the_n_draw_sampler(seed, law):
    check_collapse(law, seed)


@pytest.mark.parametrize(("seed", "factor"), [(1, 0.98), (2, 1.02), (3, 1.02)])
@pytest.mark.parametrize("law", [LAWS[0], LAWS[-1]], ids=name_of)
def test_two_percent_in_the_scale_are_noticed(law, seed, factor):
    with pytest.raises(AssertionError, match="Kolmogorov"):
        check_collapse(law, seed, replace(law, scale=factor * law.scale))


@pytest.mark.parametrize(
    "change",
    [{"full": True}, {"laplace": True}, {"normalised": False}, {"dof": 4}, {"alpha": (1.0, 1.0, 2.0, 4.0)}],
    ids=lambda change: next(iter(change)),
)
def test_another_law_is_noticed(change):
    with pytest.raises(AssertionError, match="Kolmogorov"):
        check_collapse(LAWS[0], 1, replace(LAWS[0], **change))


def laplace_mixture_cdf(value: np.ndarray) -> np.ndarray:
    """Of ``||pi||`` times a standard Laplace variable, pi uniform on two components, by quadrature over pi_0."""
    nodes, node_weights = np.polynomial.legendre.leggauss(40)
    p = 0.5 * (nodes + 1.0)
    norms = np.sqrt(p**2 + (1.0 - p) ** 2)
    grid = np.linspace(-30.0, 30.0, 60_001)
    cdf = sum(0.5 * w * scipy.stats.laplace.cdf(grid / norm) for w, norm in zip(node_weights, norms, strict=True))
    return np.interp(value, grid, cdf)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_entries_have_the_closed_form_laws(seed, normalised):
    """sqrt(chi2_2) times a Gaussian is a Laplace variable; N = 1 has no weights, N = 2 uniform ones."""
    law = Law(rho=(0.4, -1.0), alpha=(3.0,), dof=2, columns=1, normalised=normalised)
    unit = law.scale * np.exp(law.rho) * (math.sqrt(0.5) if normalised else 1.0)
    one = collapsed(law, seed).numpy()[:, :, 0] / unit
    two = collapsed(replace(law, alpha=(1.0, 1.0)), seed).numpy()[:, :, 0] / unit
    for row in range(2):
        assert_law(one[:, row], scipy.stats.laplace.cdf, "N = 1")
        assert_law(two[:, row], laplace_mixture_cdf, "N = 2")


# -- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [law for law in LAWS if not law.laplace], ids=name_of)
def test_entries_are_centred_and_have_the_documented_variance(law):
    a = collapsed(law, 4)
    variance = formulas.variance(
        torch.tensor(law.rho, dtype=torch.float64),
        torch.tensor(law.alpha, dtype=torch.float64).log(),
        law.scale,
        law.dof,
        normalised=law.normalised,
    )
    assert_mean(a.flatten(1), 0.0, "E A - mu")
    assert_mean(a.square(), variance.unsqueeze(-1).expand(-1, law.columns), "Var A")
    alpha = np.array(law.alpha)
    squared_norm = (alpha * (alpha + 1)).sum() / (alpha.sum() * (alpha.sum() + 1))
    c = 1 if law.normalised else law.dof
    expected = law.scale**2 * squared_norm * c * np.exp(2 * np.array(law.rho))
    np.testing.assert_allclose(variance, expected, rtol=1e-12)


def test_the_variance_falls_with_the_number_of_components():
    rho = torch.zeros(1, dtype=torch.float64)
    previous = math.inf
    for size in (1, 2, 4, 16, 64):
        law = Law(rho=(0.0,), alpha=(1.0,) * size, scale=1.0, dof=1, columns=1)
        variance = formulas.variance(rho, torch.zeros(size, dtype=torch.float64), 1.0, 1.0)
        assert variance.item() == pytest.approx(2.0 / (size + 1))
        assert_mean(collapsed(law, 5, COUNT // 4).square().flatten(), variance)
        assert variance.item() < previous
        previous = variance.item()


# -- divergence ----------------------------------------------------------------------------------------------------


def expected_divergence(rho: Tensor, nu: float, num: int, *, full: bool, normalised: bool) -> Tensor:
    constants = mixture.log_determinant_constants(
        nu, rho.shape[-1], covariance="full" if full else "diagonal", normalised=normalised
    )
    c = torch.full_like(rho, 1.0 if normalised else nu)
    return mixture.kl_divergence_terms(rho, c, torch.tensor(constants, dtype=rho.dtype), num)


@pytest.mark.parametrize("law", [law for law in LAWS if not law.laplace], ids=name_of)
def test_the_expected_divergence_is_the_mean_of_the_sampled_one(law):
    """The latter from dense covariances of the reference: N times the divergence of two Gaussians."""
    sigma = reference.covariances(law, COUNT, np.random.default_rng(6))
    num, rank = len(law.alpha), len(law.rho)
    trace, log_determinant = np.trace(sigma, axis1=1, axis2=2), np.linalg.slogdet(sigma)[1]
    rho = torch.tensor(law.rho, dtype=torch.float64)
    terms = expected_divergence(rho, law.dof, num, full=law.full, normalised=law.normalised)
    assert_mean(num / 2 * (trace - log_determinant - rank), terms.sum())


@pytest.mark.parametrize("full", [False, True])
def test_the_sampled_divergence_is_that_of_gaussians(full):
    rho = torch.tensor([[0.3, -0.5, 0.1]], dtype=torch.float64).expand(100, -1)
    generator = torch.Generator().manual_seed(0)
    t = wishart.raw_bartlett(3, 3, 100, rho, generator)
    raw = t if full else t.diagonal(dim1=-1, dim2=-2).square()
    root = formulas.wishart_factor(rho, raw, 3.0)
    root = root if full else torch.diag_embed(root)
    norms, log_determinants = (t.square().sum(-1), t.diagonal(dim1=-1, dim2=-2).square()) if full else (raw, raw)
    actual = mixture.kl_divergence_terms(rho, norms / 3.0, (log_determinants / 3.0).log(), 5).sum(-1)
    zeros, eye = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    expected = 5 * torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(zeros, scale_tril=root),
        torch.distributions.MultivariateNormal(zeros, scale_tril=eye),
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_divergence_is_never_negative(dtype):
    cases = np.random.default_rng(7)
    generator = torch.Generator().manual_seed(7)
    for _ in range(1000):
        rank, num = int(cases.integers(1, 129)), int(cases.integers(1, 257))
        nu = rank * 10.0 ** cases.uniform(0, 9) if cases.random() < 0.5 else float(rank)
        full, normalised = cases.random(2) < 0.5
        # from everywhere down to a hair's breadth from the minimum
        rho = torch.as_tensor(10.0 ** cases.uniform(-9, 1) * cases.standard_normal(rank), dtype=dtype)
        rho = (rho if normalised else rho - 0.5 * math.log(nu)).requires_grad_()
        expected = expected_divergence(rho, nu, num, full=full, normalised=normalised).sum()
        q = wishart.raw_chi_square(torch.full((rank,), nu, dtype=dtype), generator) / nu
        off = torch.rand(rank, dtype=dtype, generator=generator) if full else torch.zeros(rank, dtype=dtype)
        sampled = mixture.kl_divergence_terms(rho, q + off, q.log(), num).sum()
        for value in (expected, sampled):
            (grad,) = torch.autograd.grad(value, rho)
            assert value >= 0
            assert torch.isfinite(value)
            assert torch.isfinite(grad).all()


@pytest.mark.parametrize("nu", [1.0, 16.0, 1e6])
@pytest.mark.parametrize("size", [1e-4, 1.0, 10.0])
def test_the_divergence_in_float32_agrees_with_float64(size, nu):
    rho = size * torch.tensor([1.0, -0.3, 0.7], dtype=torch.float64)
    for normalised in (True, False):
        exact = expected_divergence(rho, nu, 4, full=False, normalised=normalised)
        single = expected_divergence(rho.float(), nu, 4, full=False, normalised=normalised)
        torch.testing.assert_close(single.double(), exact, rtol=3e-5, atol=1e-9)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_published_law_cannot_bring_its_divergences_below_170_nats(full, normalised):
    """docs/method.md section 1, at r = 16 and N = 8. The sum is separable and convex in each row's log variance."""
    rank, num = 16, 8

    def total(rho: Tensor) -> Tensor:
        kl_z = expected_divergence(rho, rank, num, full=full, normalised=normalised)
        return wishart.kl_divergence_terms(rho, float(rank)) + kl_z

    def objective(value: float) -> float:
        return total(torch.full((rank,), value, dtype=torch.float64)).sum().item()

    best = scipy.optimize.minimize_scalar(objective, bounds=(-5.0, 3.0), method="bounded", options={"xatol": 1e-10})
    grid = torch.linspace(-10.0, 5.0, 20_001, dtype=torch.float64)
    everywhere = total(grid.unsqueeze(-1).expand(-1, rank)).sum(-1).min().item()
    assert best.fun <= everywhere <= best.fun * (1 + 1e-4)
    if normalised:
        # zero gradient exactly at the prior, where KL_Sigma is 0 and the rest is Jensen's gap
        assert best.x == pytest.approx(0.0, abs=1e-5)
        gap = formulas.wishart_moments(
            torch.zeros(rank), rank, covariance="full" if full else "diagonal"
        ).log_determinant
        assert best.fun == pytest.approx(-num / 2 * gap.item(), rel=1e-6)
        assert best.fun < (75.0 if full else 5.0)
    else:
        assert best.fun > 170.0
        assert full or best.fun == pytest.approx(170.6, abs=0.1)


def test_constants_are_the_rows_share_of_the_log_determinant():
    for covariance, normalised in itertools.product(("diagonal", "full"), (True, False)):
        constants = mixture.log_determinant_constants(5.0, 4, covariance=covariance, normalised=normalised)
        whole = formulas.wishart_moments(torch.zeros(4).double(), 5.0, covariance=covariance, normalised=normalised)
        assert sum(constants) == pytest.approx(whole.log_determinant.item(), rel=1e-12)


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_gradients(full):
    generator = torch.Generator().manual_seed(0)

    def number(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    mu, scale, factor, xi = number(3, 4), number(), number(3, 3) if full else number(3), number(3, 4)
    pi = number(5).softmax(-1).detach().requires_grad_()
    assert torch.autograd.gradcheck(formulas.draw, (mu, scale, pi, factor, xi))
    rho, eta = number(3), number(5)
    for normalised in (True, False):
        assert torch.autograd.gradcheck(
            lambda r, c=normalised: expected_divergence(r, 3.0, 5, full=full, normalised=c), rho
        )
        assert torch.autograd.gradcheck(
            lambda r, e, s, c=normalised: formulas.variance(r, e, s, 3.0, normalised=c), (rho, eta, scale)
        )
