from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from monteclora.posterior import dirichlet
from monteclora.posterior.settings import Approximation
from tests import reference
from tests.posterior import formulas
from tests.posterior.checks import COUNT, SEEDS, assert_law, assert_mean

CONCENTRATIONS = [(0.5, 1.0, 2.0, 4.0), (0.2, 0.3, 20.0), (200.0, 1000.0, 500.0)]
SIZES = [1, 2, 3, 4, 16, 24, 32, 64, 256]
LAWS = ["exact", "laplace"]


def log(alpha: tuple[float, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(alpha, dtype=torch.float64).log().to(dtype)


def draws(eta: Tensor, law: Approximation, seed: int, count: int = COUNT) -> tuple[Tensor, dirichlet.Raw]:
    eta = eta.expand(count, -1).contiguous()
    return eta, dirichlet.raw(eta, law, torch.Generator().manual_seed(seed))


def weights(eta: Tensor, law: Approximation, seed: int) -> np.ndarray:
    return formulas.weights(*draws(eta, law, seed)).double().numpy()


# -- laws ----------------------------------------------------------------------------------------------------------


def check_beta_marginals(alpha: tuple[float, ...], seed: int, dtype: torch.dtype, eta: Tensor | None = None) -> None:
    pi = weights(log(alpha, dtype) if eta is None else eta.to(dtype), "exact", seed)
    np.testing.assert_allclose(pi.sum(-1), 1.0, atol=1e-6)
    for k, concentration in enumerate(alpha):
        rest = sum(alpha) - concentration
        assert_law(pi[:, k], lambda x, a=concentration, b=rest: scipy.special.betainc(a, b, x), f"pi_{k}")
    pair = (alpha[0] + alpha[1], sum(alpha[2:]))
    assert_law(pi[:, 0] + pi[:, 1], lambda x: scipy.special.betainc(*pair, np.minimum(x, 1.0)), "pi_0 + pi_1")


@pytest.mark.parametrize("alpha", CONCENTRATIONS)
@pytest.mark.parametrize(("seed", "dtype"), [*((seed, torch.float32) for seed in SEEDS), (1, torch.float64)])
def test_exact_weights_have_beta_marginals(alpha, seed, dtype):
    check_beta_marginals(alpha, seed, dtype)


@pytest.mark.parametrize("factor", [0.98, 1.02])
@pytest.mark.parametrize("seed", SEEDS)
def test_two_percent_in_one_concentration_are_noticed(seed, factor):
    alpha = torch.tensor(CONCENTRATIONS[2], dtype=torch.float64)
    wrong = alpha * torch.tensor([1.0, factor, 1.0])
    with pytest.raises(AssertionError, match="Kolmogorov"):
        check_beta_marginals(CONCENTRATIONS[2], seed, torch.float32, wrong.log())


def squared_norm_cdf(alpha: float, value: np.ndarray) -> np.ndarray:
    """Of ||pi||^2 for two components of the same concentration: pi_0 is within an interval around 1/2."""
    half_width = 0.5 * np.sqrt(np.clip(2.0 * value - 1.0, 0.0, 1.0))
    return 1.0 - 2.0 * scipy.special.betainc(alpha, alpha, 0.5 - half_width)


@functools.cache
def reference_squared_norms(concentration: float, law: Approximation) -> np.ndarray:
    model = reference.Law(alpha=(concentration,) * 8, laplace=law == "laplace")
    return np.sort((reference.weights(model, 2 * COUNT, np.random.default_rng(0)) ** 2).sum(-1))


def check_squared_norm(concentration: float, law: Approximation, seed: int, factor: float = 1.0) -> None:
    """||pi||^2 of eight components against the reference, and, for the exact law, of two against the closed form."""
    eta = torch.full((8,), math.log(factor * concentration), dtype=torch.float64)
    norms = (2.0 * dirichlet.log_norm(*draws(eta, law, seed))).exp()
    assert_law(norms, reference_squared_norms(concentration, law), "||pi||^2")
    if law == "exact":
        pair = (2.0 * dirichlet.log_norm(*draws(eta[:2], law, seed))).exp()
        assert_law(pair, functools.partial(squared_norm_cdf, concentration), "||pi||^2 of two")


@pytest.mark.parametrize("concentration", [0.3, 5.0])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_squared_norm_has_its_law(seed, law, concentration):
    check_squared_norm(concentration, law, seed)


@pytest.mark.parametrize("factor", [0.98, 1.02])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("seed", SEEDS)
def test_two_percent_in_the_concentrations_are_noticed(seed, law, factor):
    with pytest.raises(AssertionError, match="Kolmogorov"):
        check_squared_norm(5.0, law, seed, factor)


def check_laplace_log_ratios(alpha: tuple[float, ...], seed: int, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Differences of Gaussian logits: Normal(log a_i - log a_j, var_i + var_j), docs/method.md section 2."""
    pi = torch.as_tensor(weights(log(alpha, dtype), "laplace", seed))
    n, inverse = len(alpha), [1.0 / a for a in alpha]
    variance = [v * (1.0 - 2.0 / n) + sum(inverse) / n**2 for v in inverse]
    for i in range(n - 1):
        std = math.sqrt(variance[i] + variance[i + 1])
        ratio = (pi[:, i] / pi[:, i + 1]).log() - math.log(alpha[i] / alpha[i + 1])
        assert_law(ratio, scipy.stats.norm(0.0, std).cdf, "log ratio")
        assert_law((factor * ratio).abs(), scipy.stats.halfnorm(0.0, std).cdf, "size of the log ratio")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [(2.0, 0.5), (0.5, 1.0, 2.0, 4.0)])
@pytest.mark.parametrize("seed", SEEDS)
def test_laplace_weights_have_gaussian_log_ratios(alpha, seed, dtype):
    check_laplace_log_ratios(alpha, seed, dtype)


@pytest.mark.parametrize("factor", [0.98, 1.02])
@pytest.mark.parametrize("seed", SEEDS)
def test_two_percent_in_the_laplace_spread_are_noticed(seed, factor):
    with pytest.raises(AssertionError, match="Kolmogorov"):
        check_laplace_log_ratios((0.5, 1.0, 2.0, 4.0), seed, torch.float64, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1e-3, 1e-2])
def test_tiny_concentrations_keep_their_law_where_gamma_draws_would_underflow(alpha, dtype):
    pi = weights(torch.full((4,), math.log(alpha), dtype=dtype), "exact", 4)
    np.testing.assert_allclose(pi.sum(-1), 1.0, atol=1e-6)
    for bound in (1e-30, 1e-6, 0.01, 0.5, 0.99):
        assert_mean(pi <= bound, np.full(4, scipy.stats.beta(alpha, 3 * alpha).cdf(bound)), f"P(pi <= {bound})")


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("size", SIZES)
def test_log_norm_is_that_of_the_weights(size, law):
    eta, raw = draws(torch.linspace(-2.0, 3.0, size, dtype=torch.float64), law, 1, 1000)
    log_norm = dirichlet.log_norm(eta, raw)
    torch.testing.assert_close(log_norm, formulas.weights(eta, raw).norm(dim=-1).log())
    assert torch.all((log_norm <= 1e-12) & (log_norm >= -0.5 * math.log(size) - 1e-12))


# -- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [*CONCENTRATIONS, (1e-3, 1e-3), (1e-3, 1.0, 1e3)])
def test_moments_are_those_of_the_draws(alpha):
    pi = weights(log(alpha), "exact", 5)
    assert_mean(pi, log(alpha).softmax(-1), "E pi")
    assert_mean((pi**2).sum(-1), dirichlet.mean_squared_norm(log(alpha)), "E||pi||^2")


@pytest.mark.parametrize("alpha", [*CONCENTRATIONS, (1e-3,) * 256, (1e3,) * 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_squared_norms_mean_is_the_documented_formula(alpha, dtype):
    total = sum(alpha)
    expected = sum(a * (a + 1) for a in alpha) / (total * (total + 1))
    actual = dirichlet.mean_squared_norm(log(alpha, dtype))
    assert actual.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_uniform_weights_have_squared_norm_two_over_n_plus_one(size):
    assert dirichlet.mean_squared_norm(torch.zeros(size)).item() == pytest.approx(2 / (size + 1), rel=1e-6)


# -- divergence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("alpha", CONCENTRATIONS)
def test_divergence_is_the_textbook_formula_and_torchs(alpha, prior):
    a, n = np.array(alpha), len(alpha)
    gammaln, digamma = scipy.special.gammaln, scipy.special.digamma
    expected = gammaln(a.sum()) - gammaln(a).sum() - gammaln(n * prior) + n * gammaln(prior)
    expected += ((a - prior) * (digamma(a) - digamma(a.sum()))).sum()
    actual = dirichlet.kl_divergence(log(alpha), prior)
    assert actual.item() == pytest.approx(expected, rel=1e-9)
    torchs = torch.distributions.kl_divergence(
        torch.distributions.Dirichlet(torch.tensor(alpha, dtype=torch.float64)),
        torch.distributions.Dirichlet(torch.full((n,), prior, dtype=torch.float64)),
    )
    torch.testing.assert_close(actual, torchs)


def test_divergence_is_the_mean_log_density_ratio_of_a_million_draws():
    alpha, prior = (0.5, 2.0, 4.0), 3.0
    pi = formulas.weights(*draws(log(alpha), "exact", 6, 1_000_000))
    posterior = torch.distributions.Dirichlet(torch.tensor(alpha, dtype=torch.float64))
    reference_law = torch.distributions.Dirichlet(torch.full((len(alpha),), prior, dtype=torch.float64))
    assert_mean(posterior.log_prob(pi) - reference_law.log_prob(pi), dirichlet.kl_divergence(log(alpha), prior))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_is_finite_and_never_negative(dtype):
    cases = np.random.default_rng(7)
    for _ in range(1000):
        size, prior = int(cases.integers(1, 257)), 10.0 ** cases.uniform(-3, 3)
        # from everywhere down to a hair's breadth from the prior
        spread = 10.0 ** cases.uniform(-9, 0.8)
        eta = torch.as_tensor(np.log(prior) + spread * cases.uniform(-1, 1, size), dtype=dtype)
        eta = eta.clamp(math.log(1e-3), math.log(1e3)).requires_grad_()
        value = dirichlet.kl_divergence(eta, prior)
        (grad,) = torch.autograd.grad(value, eta)
        assert value >= 0
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_divergence_and_its_gradient_vanish_at_the_prior(size, dtype):
    eta = torch.zeros(size, dtype=dtype, requires_grad=True)
    value = dirichlet.kl_divergence(eta, 1.0)
    (grad,) = torch.autograd.grad(value, eta)
    assert value == 0
    assert grad.abs().max() == 0


def test_the_published_codes_failures_are_gone():
    """It was negative at N = 4 and 16, infinite at 32 and not a number at 64."""
    for size in (4, 16, 32, 64):
        expected = (
            scipy.special.gammaln(2 * size)
            - scipy.special.gammaln(size)
            + size * (scipy.special.digamma(2.0) - scipy.special.digamma(2.0 * size))
        )
        actual = dirichlet.kl_divergence(torch.full((size,), math.log(2.0)), 1.0)
        assert actual.item() == pytest.approx(expected, rel=1e-6)


# -- gradients -----------------------------------------------------------------------------------------------------


def test_gradients_of_the_closed_forms():
    eta = torch.tensor([-3.0, -0.5, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: dirichlet.kl_divergence(e, 0.7), eta)
    assert torch.autograd.gradcheck(dirichlet.mean_squared_norm, eta)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("size", [1, 2, 3, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_the_norms_gradient_in_closed_form_is_autograds(size, law, dtype, tolerance):
    generator = torch.Generator().manual_seed(size)
    eta = (2.0 * torch.randn(50, size, dtype=torch.float64, generator=generator)).to(dtype).requires_grad_()
    raw = dirichlet.raw(eta, law, generator)
    log_norm, gradient = dirichlet.log_norm_with_gradient(eta, raw)
    expected = dirichlet.log_norm(eta, raw)
    (autograds,) = torch.autograd.grad(expected.sum(), eta)
    assert not log_norm.requires_grad
    assert torch.equal(log_norm, expected.detach())
    assert gradient.shape == eta.shape
    torch.testing.assert_close(gradient, autograds, rtol=100 * tolerance, atol=tolerance)


def test_gradients_of_the_laplace_draws():
    eta = torch.tensor([[-3.0, -0.5, 0.0, 2.0], [0.0, 0.0, 1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    raw = dirichlet.raw(eta, "laplace", torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda e: formulas.weights(e, raw), eta)
    assert torch.autograd.gradcheck(lambda e: dirichlet.log_norm(e, raw), eta)


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 10.0, 1e3])
def test_a_gamma_draws_derivative_is_that_of_its_quantile(alpha):
    """The implicit derivative is d/d alpha of the quantile function at the draw's own probability."""
    eta, raw = draws(torch.full((1,), math.log(alpha), dtype=torch.float64), "exact", 8, 2000)
    assert raw.gamma_grad is not None
    shape, gamma = eta.numpy() * 0 + alpha + 1.0, raw.gamma.numpy()
    probability = scipy.special.gammainc(shape, gamma)
    inner = (probability > 1e-3) & (probability < 1 - 1e-3)
    step = 1e-4 * (alpha + 1.0)
    upper, lower = (scipy.special.gammaincinv(shape + s, probability) for s in (step, -step))
    expected = ((upper - lower) / (2 * step))[inner]
    np.testing.assert_allclose(raw.gamma_grad.numpy()[inner], expected, rtol=1e-3)


GRADIENT_CASES = [(a,) * n for a in (1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3) for n in (2, 5)]
GRADIENT_CASES += [(1e-3, 1.0, 1e3), (0.01, 0.1, 1.0), (0.5, 1.0, 2.0, 4.0)]


def pathwise(alpha: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """d||pi||^2/d eta of every draw, shape (count, N), and d E||pi||^2/d eta, shape (N,)."""
    eta, raw = draws(log(alpha, dtype), "exact", 9)
    eta.requires_grad_()
    (each,) = torch.autograd.grad((2.0 * dirichlet.log_norm(eta, raw)).exp().sum(), eta)
    exact = log(alpha).requires_grad_()
    (mean,) = torch.autograd.grad(dirichlet.mean_squared_norm(exact), exact)
    return each.double(), mean


@pytest.mark.parametrize(
    ("alpha", "dtype"),
    [*((alpha, torch.float64) for alpha in GRADIENT_CASES), *((alpha, torch.float32) for alpha in GRADIENT_CASES[::5])],
)
def test_the_pathwise_gradient_is_unbiased(alpha, dtype):
    each, mean = pathwise(alpha, dtype)
    assert torch.isfinite(each).all()
    assert_mean(each, mean)
    assert_mean(each.sum(-1), mean.sum())


@pytest.mark.parametrize("alpha", [(0.1,) * 5, (1.0,) * 5, (10.0,) * 5])
def test_three_percent_in_a_gradient_are_noticed(alpha):
    each, mean = pathwise(alpha, torch.float64)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean(1.03 * each.sum(-1), mean.sum())


def test_the_gradient_without_the_implicit_part_would_be_wrong():
    eta, raw = draws(log((2.0, 2.0)), "exact", 9)
    assert raw.gamma_grad is not None
    eta.requires_grad_()
    blind = raw._replace(gamma_grad=torch.zeros_like(raw.gamma_grad))
    (each,) = torch.autograd.grad((2.0 * dirichlet.log_norm(eta, blind)).exp().sum(), eta)
    exact = log((2.0, 2.0)).requires_grad_()
    (mean,) = torch.autograd.grad(dirichlet.mean_squared_norm(exact), exact)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean(each, mean)


# -- the whole range -----------------------------------------------------------------------------------------------


@given(
    size=st.sampled_from(SIZES),
    low=st.floats(-3.0, 3.0),
    high=st.floats(-3.0, 3.0),
    law=st.sampled_from(LAWS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_finite(size, low, high, law, dtype, seed):
    eta = (torch.linspace(low, high, size, dtype=dtype) * math.log(10.0)).requires_grad_()
    raw = dirichlet.raw(eta, law, torch.Generator().manual_seed(seed))
    pi = formulas.weights(eta, raw)
    log_norm = dirichlet.log_norm(eta, raw)
    mean = dirichlet.mean_squared_norm(eta)
    divergence = dirichlet.kl_divergence(eta)
    probe = torch.linspace(-1.0, 1.0, size, dtype=dtype)
    outputs = [(pi * probe).sum(), log_norm, mean, divergence]
    for value in outputs:
        (grad,) = torch.autograd.grad(value, eta, retain_graph=True)
        assert value.dtype == dtype
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()
    assert pi.min() >= 0
    assert pi.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert log_norm <= 1e-6
    assert divergence >= 0


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e3])
def test_one_component_has_weight_one_and_no_gradient(alpha, law):
    eta = torch.full((3, 1), math.log(alpha), requires_grad=True)
    raw = dirichlet.raw(eta, law, torch.Generator().manual_seed(0))
    pi, log_norm = formulas.weights(eta, raw), dirichlet.log_norm(eta, raw)
    assert torch.equal(pi, torch.ones(3, 1))
    assert torch.equal(log_norm, torch.zeros(3))
    for value in (pi.sum(), log_norm.sum(), dirichlet.mean_squared_norm(eta).sum()):
        (grad,) = torch.autograd.grad(value, eta)
        assert torch.equal(grad, torch.zeros(3, 1))
    assert torch.equal(dirichlet.mean_squared_norm(eta), torch.ones(3))
