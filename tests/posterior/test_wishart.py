from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from monteclora.posterior import wishart
from tests.posterior import formulas
from tests.posterior.checks import COUNT, SEEDS, assert_law, assert_mean

RHO = (0.3, -0.5, 0.1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factors(rho: tuple[float, ...], nu: float, *, full: bool, normalised: bool, seed: int, count: int) -> Tensor:
    """``L``, shape (count, r, r), in float64."""
    log_std = torch.tensor(rho, dtype=torch.float64).expand(count, -1)
    if full:
        raw = wishart.raw_bartlett(nu, len(rho), count, log_std, generator(seed))
        return formulas.wishart_factor(log_std, raw, nu, normalised=normalised)
    raw = wishart.raw_chi_square(torch.full_like(log_std, nu), generator(seed))
    return torch.diag_embed(formulas.wishart_factor(log_std, raw, nu, normalised=normalised))


# -- laws ----------------------------------------------------------------------------------------------------------


def check_chi_square(nu: float, dtype: torch.dtype, seed: int, factor: float = 1.0) -> None:
    draw = factor * wishart.raw_chi_square(torch.full((COUNT,), nu, dtype=dtype), generator(seed))
    assert draw.dtype == dtype
    assert draw.min() > 0
    assert_law(draw, scipy.stats.chi2(nu).cdf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nu", [1.0, 2.0, 4.5, 128.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_chi_square_draws_have_their_law(nu, dtype, seed):
    check_chi_square(nu, dtype, seed)


@pytest.mark.parametrize("factor", [0.98, 1.02])
@pytest.mark.parametrize("nu", [2.0, 4.5, 128.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_two_percent_in_the_chi_square_are_noticed(nu, seed, factor):
    with pytest.raises(AssertionError, match="Kolmogorov"):
        check_chi_square(nu, torch.float32, seed, factor)


def check_bartlett_closed_forms(statistic: str, seed: int, factor: float = 1.0) -> None:
    """Classical laws: the trace is chi-square, and at r = nu = 2 so is 2 sqrt|Sigma|; Sigma_21 is Laplace."""
    t = wishart.raw_bartlett(2, 2, COUNT, torch.empty((), dtype=torch.float64), generator(seed))
    assert torch.equal(t, t.tril())
    t *= math.sqrt(factor)
    if statistic == "trace":
        assert_law(t.square().sum((-1, -2)), scipy.stats.chi2(4).cdf)
    elif statistic == "determinant":
        assert_law(2.0 * (t[:, 0, 0] * t[:, 1, 1]), scipy.stats.chi2(2).cdf)
    else:
        off = t[:, 1, 0] * t[:, 0, 0]
        assert_law(off, scipy.stats.laplace.cdf)
        assert_law(off.abs(), scipy.stats.expon.cdf)


@pytest.mark.parametrize("statistic", ["trace", "determinant", "off-diagonal"])
@pytest.mark.parametrize("seed", SEEDS)
def test_bartlett_factors_have_the_closed_form_laws(seed, statistic):
    check_bartlett_closed_forms(statistic, seed)


@pytest.mark.parametrize("statistic", ["trace", "determinant", "off-diagonal"])
@pytest.mark.parametrize("factor", [0.98, 1.02])
@pytest.mark.parametrize("seed", SEEDS)
def test_two_percent_in_a_bartlett_factor_are_noticed(seed, statistic, factor):
    with pytest.raises(AssertionError, match="Kolmogorov"):
        check_bartlett_closed_forms(statistic, seed, factor)


def statistics(sigma: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "tr Sigma": np.trace(sigma, axis1=1, axis2=2),
        "log|Sigma|": np.linalg.slogdet(sigma)[1],
        "Sigma_11": sigma[:, 0, 0],
        "Sigma_33": sigma[:, 2, 2],
        "Sigma_21": sigma[:, 1, 0],
        "|Sigma_32|": np.abs(sigma[:, 2, 1]),
        "correlation": sigma[:, 2, 0] / np.sqrt(sigma[:, 2, 2] * sigma[:, 0, 0]),
    }


@pytest.fixture(scope="module")
def scipy_statistics() -> dict[str, np.ndarray]:
    """Of 100,000 draws of scipy's Wishart(diag(exp(2 rho)) / 4, 4), each sorted."""
    scale = np.diag(np.exp(2 * np.array(RHO))) / 4
    sigma = scipy.stats.wishart(4, scale).rvs(COUNT // 2, random_state=np.random.default_rng(0))
    return {name: np.sort(values) for name, values in statistics(sigma).items()}


def check_full_covariance(seed: int, expected: dict[str, np.ndarray], shift: float = 0.0) -> None:
    rho = tuple(value + shift for value in RHO)
    root = factors(rho, 4, full=True, normalised=True, seed=seed, count=COUNT)
    for name, values in statistics((root @ root.mT).numpy()).items():
        assert_law(values, expected[name], name)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_full_covariance_has_the_law_of_scipys_wishart(seed, scipy_statistics):
    check_full_covariance(seed, scipy_statistics)


@pytest.mark.parametrize("shift", [-0.5 * math.log(1.02), 0.5 * math.log(1.02)])
@pytest.mark.parametrize("seed", SEEDS)
def test_two_percent_in_a_full_covariance_are_noticed(seed, shift, scipy_statistics):
    with pytest.raises(AssertionError, match="Kolmogorov"):
        check_full_covariance(seed, scipy_statistics, shift)


def test_rank_one_is_a_chi_square_variable():
    root = factors((0.4,), 1.0, full=True, normalised=True, seed=1, count=COUNT)
    assert_law(root.square() / math.exp(0.8), scipy.stats.chi2(1).cdf)


# -- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("nu", [3.0, 7.5])
def test_moments_are_those_of_the_draws(nu, covariance, normalised):
    full = covariance == "full"
    root = factors(RHO, nu, full=full, normalised=normalised, seed=5, count=COUNT)
    moments = formulas.wishart_moments(
        torch.tensor(RHO, dtype=torch.float64), nu, covariance=covariance, normalised=normalised
    )
    assert_mean(root.square().sum((-1, -2)), moments.trace, "tr Sigma")
    log_determinant = 2.0 * root.diagonal(dim1=-1, dim2=-2).log().sum(-1)
    assert_mean(log_determinant, moments.log_determinant, "log|Sigma|")
    variance = torch.tensor(RHO, dtype=torch.float64).mul(2).exp() * (1.0 if normalised else nu)
    assert_mean((root @ root.mT).flatten(1), torch.diag(variance).flatten(), "Sigma")


def test_moments_are_the_documented_formulas():
    rho, nu, rank = torch.tensor(RHO, dtype=torch.float64), 5.0, 3
    log_v = 2.0 * sum(RHO)
    diagonal = log_v + rank * math.log(2) + rank * scipy.special.digamma(nu / 2)
    full = log_v + rank * math.log(2) + sum(scipy.special.digamma((nu - i + 1) / 2) for i in range(1, rank + 1))
    for covariance, expected in (("diagonal", diagonal), ("full", full)):
        published = formulas.wishart_moments(rho, nu, covariance=covariance, normalised=False)
        ours = formulas.wishart_moments(rho, nu, covariance=covariance, normalised=True)
        assert published.log_determinant.item() == pytest.approx(expected, rel=1e-14)
        assert ours.log_determinant.item() == pytest.approx(expected - rank * math.log(nu), rel=1e-14)
        assert published.trace.item() == pytest.approx(nu * ours.trace.item(), rel=1e-14)


# -- divergence ----------------------------------------------------------------------------------------------------


def wishart_of(rho: Tensor, nu: float) -> torch.distributions.Wishart:
    covariance = torch.diag((2.0 * rho).exp())
    return torch.distributions.Wishart(torch.tensor(nu, dtype=rho.dtype), covariance, validate_args=False)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("nu", [3.0, 4.5, 64.0])
def test_divergence_is_that_of_torch_distributions(nu, normalised):
    rho = torch.tensor(RHO, dtype=torch.float64)
    shift = -0.5 * math.log(nu) if normalised else 0.0
    expected = torch.distributions.kl_divergence(
        wishart_of(rho + shift, nu), wishart_of(torch.full_like(rho, shift), nu)
    )
    torch.testing.assert_close(wishart.kl_divergence(rho, nu), expected, rtol=1e-10, atol=0.0)


def test_divergence_is_the_mean_log_density_ratio_of_a_million_draws():
    nu, rho = 4.0, torch.tensor(RHO, dtype=torch.float64)
    root = factors(RHO, nu, full=True, normalised=False, seed=6, count=1_000_000)
    posterior, prior = wishart_of(rho, nu), wishart_of(torch.zeros_like(rho), nu)
    sigma = root @ root.mT
    ratio = posterior.log_prob(sigma) - prior.log_prob(sigma)
    assert_mean(ratio, wishart.kl_divergence(rho, nu))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_is_never_negative_and_zero_only_at_the_prior(dtype):
    cases = np.random.default_rng(7)
    for _ in range(1000):
        rank = int(cases.integers(1, 129))
        size = 10.0 ** cases.uniform(-9, 1)
        rho = torch.as_tensor(size * cases.standard_normal(rank), dtype=dtype)
        value = wishart.kl_divergence(rho, float(rank))
        assert torch.isfinite(value)
        assert value >= 0
    assert wishart.kl_divergence(torch.zeros(8, dtype=dtype), 8.0) == 0


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 10.0])
def test_divergence_in_float32_agrees_with_float64(size):
    rho = size * torch.tensor(RHO, dtype=torch.float64)
    exact = wishart.kl_divergence(rho, 3.0)
    # the input itself is rounded, and the divergence is quadratic in it
    torch.testing.assert_close(wishart.kl_divergence(rho.float(), 3.0).double(), exact, rtol=1e-4, atol=1e-12)


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [True, False])
def test_gradients(normalised):
    rho = torch.tensor([RHO, RHO[::-1]], dtype=torch.float64, requires_grad=True)
    chi_square = wishart.raw_chi_square(torch.full((2, 3), 3.0, dtype=torch.float64), generator(1))
    bartlett = wishart.raw_bartlett(3.0, 3, 2, rho.detach(), generator(2))
    for raw in (chi_square, bartlett):
        assert torch.autograd.gradcheck(
            lambda r, raw=raw: formulas.wishart_factor(r, raw, 3.0, normalised=normalised), rho
        )
    assert torch.autograd.gradcheck(lambda r: wishart.kl_divergence(r, 3.0), rho)
    for covariance in ("diagonal", "full"):
        assert torch.autograd.gradcheck(
            lambda r, c=covariance: formulas.wishart_moments(r, 3.0, covariance=c, normalised=normalised), rho
        )


def test_draws_of_many_layers_are_batched_like_those_of_one():
    rho = torch.randn(5, 3, dtype=torch.float64, generator=generator(0))
    raw = wishart.raw_bartlett(3.0, 3, 5, rho, generator(1))
    nu = torch.full((5, 3), 3.0, dtype=torch.float64)
    together = formulas.wishart_factor(rho, raw.square().sum(-1), nu)
    for i in range(5):
        torch.testing.assert_close(together[i], formulas.wishart_factor(rho[i], raw[i].square().sum(-1), 3.0))
        torch.testing.assert_close(
            formulas.wishart_factor(rho, raw, 3.0)[i], formulas.wishart_factor(rho[i], raw[i], 3.0)
        )
