"""The regulariser and the gradients of a posterior's draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from monteclora.errors import ConfigError
from monteclora.posterior import AdapterPosterior, LayerShape, PosteriorSettings, dirichlet
from monteclora.posterior.bounds import bounded
from tests.posterior import formulas
from tests.posterior.building import posterior_of, random_posterior, row_scales
from tests.posterior.checks import assert_mean
from tests.reference import Law

COVARIANCES = ["diagonal", "full"]
LAWS = ["exact", "laplace"]
ESTIMATORS = ["expected", "sampled"]


class Loss(torch.nn.Module):
    """A regulariser's parts as a function of the posterior's parameters."""

    def __init__(self, posterior: AdapterPosterior) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self) -> tuple[Tensor, ...]:
        parts = self.posterior.regulariser()
        return parts.kl_pi, parts.kl_sigma, parts.kl_z, parts.coop


def parts_at(posterior: AdapterPosterior, rho: Tensor, eta: Tensor) -> tuple[Tensor, ...]:
    return functional_call(Loss(posterior), {"posterior.rho": rho, "posterior.eta": eta})


def parameters(posterior: AdapterPosterior) -> tuple[Tensor, Tensor]:
    return tuple(p.detach().clone().requires_grad_() for p in (posterior.rho, posterior.eta))


# -- the regulariser -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("covariance", "normalised"), [*itertools.product(COVARIANCES, (True, False))])
def test_the_parts_are_means_over_layers_of_the_documented_formulas(covariance, normalised):
    shapes = ((2, 5), (3, 4), (1, 7))
    posterior = random_posterior(
        shapes=shapes, covariance=covariance, normalised=normalised, num_components=3, alpha_prior=0.7
    ).double()
    parts = posterior.regulariser()
    rows = posterior.rho.split([rank for rank, _ in shapes])
    expected = {"kl_pi": [], "kl_sigma": [], "kl_z": [], "coop": []}
    for (rank, _), rho, eta in zip(shapes, rows, posterior.eta, strict=True):
        alpha = eta.exp()
        prior = torch.distributions.Dirichlet(torch.full_like(alpha, 0.7))
        expected["kl_pi"].append(torch.distributions.kl_divergence(torch.distributions.Dirichlet(alpha), prior))
        v = (2 * rho).exp()
        expected["kl_sigma"].append(rank / 2 * (v.sum() - v.log().sum() - rank))
        sigma = formulas.wishart_moments(rho, rank, covariance=covariance, normalised=normalised)
        expected["kl_z"].append(3 / 2 * (sigma.trace - sigma.log_determinant - rank))
        expected["coop"].append((alpha * (alpha + 1)).sum() / (alpha.sum() * (alpha.sum() + 1)))
    for name, values in expected.items():
        torch.testing.assert_close(getattr(parts, name), torch.stack(values).mean(), rtol=1e-7, atol=0.0)


def test_the_loss_weighs_divergences_and_cooperation():
    parts = random_posterior(kl_weight=0.3, coop_weight=0.8).regulariser()
    expected = 0.3 * (parts.kl_pi + parts.kl_sigma + parts.kl_z) + 0.8 * parts.coop
    torch.testing.assert_close(parts.loss, expected)


@pytest.mark.parametrize(("covariance", "normalised"), [*itertools.product(COVARIANCES, (True, False))])
def test_the_sampled_parts_and_gradients_have_the_mean_of_the_expected_ones(covariance, normalised):
    """Many copies of three layers; each copy's gradient is one observation."""
    copies, times = 150, 40
    laws = [
        Law(rho=rho, alpha=(0.5, 1.0, 2.0), dof=len(rho), full=covariance == "full", normalised=normalised)
        for rho in ((0.3, -0.5, 0.1), (-0.2,), (0.5, 0.0))
    ]
    sampled = posterior_of(laws * copies, regulariser="sampled").double()
    expected = posterior_of(laws, regulariser="expected").double()
    values, gradients = [], []
    for _ in range(times):
        sampled.draw()
        parts = sampled.regulariser()
        values.append(torch.stack([parts.kl_pi, parts.kl_sigma, parts.kl_z, parts.coop]).detach())
        observed = torch.autograd.grad(parts.kl + parts.coop, (sampled.rho, sampled.eta))
        gradients.append(torch.cat([len(sampled.layers) * g.view(copies, -1) for g in observed], dim=1))
    parts = expected.regulariser()
    exact = torch.stack([parts.kl_pi, parts.kl_sigma, parts.kl_z, parts.coop])
    torch.testing.assert_close(torch.stack(values)[:, :2], exact[:2].expand(times, -1))
    assert_mean(torch.stack(values)[:, 2:], exact[2:].detach(), "value")
    mean = torch.autograd.grad(parts.kl + parts.coop, (expected.rho, expected.eta))
    assert_mean(torch.cat(gradients), torch.cat([3 * g.flatten() for g in mean]), "gradient")


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("law", LAWS)
def test_the_sampled_divergence_describes_the_very_draw(covariance, law):
    """KL_z of the covariances that A was drawn with, and the squared norm of its weights."""
    posterior = random_posterior(covariance=covariance, dirichlet=law, regulariser="sampled", num_components=3).double()
    draw = posterior.draw()
    parts = posterior.regulariser()
    torch.testing.assert_close(parts.coop, draw.squared_norm.mean())
    scale = posterior.scale * draw.squared_norm.sqrt()
    total = torch.zeros((), dtype=torch.float64)
    for row_scale, eps, rho, squared, determinant in zip(
        row_scales(posterior, draw),
        scale,
        posterior.rho.split([2, 3, 1]),
        draw.row_squared_norm.split([2, 3, 1]),
        draw.row_log_determinant.split([2, 3, 1]),
        strict=True,
    ):
        trace = ((2 * rho).exp() * squared).sum()
        total += 3 / 2 * (trace - determinant.sum() - 2 * rho.sum() - len(rho))
        if covariance == "diagonal":
            torch.testing.assert_close(row_scale.square().squeeze(-1), eps**2 * (2 * rho).exp() * squared)
    torch.testing.assert_close(parts.kl_z, total / 3)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_are_those_of_finite_differences(estimator, law, covariance):
    posterior = random_posterior(covariance=covariance, dirichlet=law, regulariser=estimator).double()
    posterior.draw()
    rho, eta = parameters(posterior)
    # the implicit gradient of an exact draw is not the difference quotient of the frozen draw: test_dirichlet has it
    frozen = estimator == "sampled" and law == "exact"
    checked = (rho, eta.detach()) if frozen else (rho, eta)
    assert torch.autograd.gradcheck(lambda r, e: parts_at(posterior, r, e), checked)


def test_the_sampled_parts_need_a_draw():
    posterior = random_posterior(regulariser="sampled")
    with pytest.raises(ConfigError, match="training draw") as error:
        posterior.regulariser()
    assert "training mode" in error.value.hint
    posterior.sample(0, 0)
    with pytest.raises(ConfigError):
        posterior.regulariser()
    posterior.draw()
    assert torch.isfinite(posterior.regulariser().loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_are_zero_or_at_their_minimum_at_the_prior(dtype):
    posterior = AdapterPosterior([LayerShape("a", 4, 3)], [0.1], PosteriorSettings(alpha_prior=0.3)).to(dtype)
    parts = posterior.regulariser()
    assert parts.kl_sigma == 0
    assert 0 <= parts.kl_pi < 1e-12
    gradients = torch.autograd.grad(parts.kl, (posterior.rho, posterior.eta))
    for gradient in gradients:
        assert gradient.abs().max() < 1e-6


# -- the gradient of a draw ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("normalised", [True, False])
def test_noise_carries_the_gradient_of_the_mixture(normalised, law, covariance):
    """That of formulas.draw, under autograd, with the same raw draws."""
    shapes = ((2, 5), (3, 4), (1, 7))
    posterior = random_posterior(shapes=shapes, covariance=covariance, dirichlet=law, normalised=normalised).double()
    draw = posterior.draw()
    rho, eta = parameters(posterior)
    pi = formulas.weights(eta, draw.weights)
    generator = torch.Generator().manual_seed(0)
    actual = expected = torch.zeros((), dtype=torch.float64)
    of_layers = zip(draw.layers, row_scales(posterior, draw), rho.split([rank for rank, _ in shapes]), strict=True)
    for i, (part, row_scale, rows) in enumerate(of_layers):
        probe = torch.randn(part.matrix.shape, dtype=torch.float64, generator=generator)
        # L = diag(exp(rho)) T: whatever T is, rows scale with exp(rho)
        unit = (row_scale / (draw.squared_norm[i].sqrt() * posterior.scale[i])).squeeze(-1)
        factor, xi = unit * (rows - rows.detach()).exp(), (part.matrix / row_scale).detach()
        expected = expected + (probe * formulas.draw(0.0 * xi, posterior.scale[i], pi[i], factor, xi)).sum()
        actual = actual + (probe * part.matrix).sum()
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected, (rho, eta))
    got = torch.autograd.grad(actual, (posterior.rho, posterior.eta))
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("law", LAWS)
def test_the_norms_gradient_is_autograds(law):
    posterior = random_posterior(dirichlet=law).double()
    draw = posterior.draw()
    eta = posterior.eta.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(dirichlet.log_norm(eta, draw.weights).sum(), eta)
    first_cells = torch.stack([part.matrix[0, 0] for part in draw.layers])
    # noise is proportional to ||pi||, so the gradient of its logarithm is that of log||pi||
    (actual,) = torch.autograd.grad(first_cells.abs().log().sum(), posterior.eta)
    torch.testing.assert_close(actual, expected)


def test_layers_are_apart_and_may_be_passed_one_by_one_as_often_as_one_likes():
    """Reentrant checkpointing runs a backward pass for each block, and a skipped layer has none."""
    posterior = random_posterior()
    draw = posterior.draw()
    draw.layers[1].matrix.sum().backward()
    assert torch.equal(posterior.rho.grad.nonzero().flatten(), torch.tensor([2, 3, 4]))
    assert torch.equal(posterior.eta.grad.abs().sum(-1).nonzero().flatten(), torch.tensor([1]))
    once = posterior.rho.grad.clone()
    draw.layers[1].matrix.sum().backward()
    torch.testing.assert_close(posterior.rho.grad, 2 * once)
    draw.layers[0].matrix.sum().backward()
    torch.testing.assert_close(posterior.rho.grad[2:5], 2 * once[2:5])
    assert posterior.rho.grad[0] != 0


@pytest.mark.parametrize("frozen", ["rho", "eta"])
def test_a_frozen_parameter_gets_no_gradient_and_the_other_its_own(frozen):
    whole, part = random_posterior(), random_posterior()
    getattr(part, frozen).requires_grad_(False)
    for posterior in (whole, part):
        sum(layer.matrix.sum() for layer in posterior.draw().layers).backward()
    other = "eta" if frozen == "rho" else "rho"
    assert getattr(part, frozen).grad is None
    torch.testing.assert_close(getattr(part, other).grad, getattr(whole, other).grad)


def test_a_draw_without_gradient_is_the_same_draw():
    one, two, three = random_posterior(), random_posterior(), random_posterior()
    three.requires_grad_(False)
    with torch.no_grad():
        quiet = one.draw()
    for draw in (two.draw(), three.draw()):
        for a, b in zip(quiet.layers, draw.layers, strict=True):
            assert torch.equal(a.matrix, b.matrix)
    assert not quiet.layers[0].matrix.requires_grad
    assert not three.current.layers[0].matrix.requires_grad


# -- the whole range -----------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=150)
@given(
    size=st.sampled_from([1, 2, 3, 4, 16, 24, 32, 64, 256]),
    ranks=st.lists(st.sampled_from([1, 2, 4, 8, 64, 128]), min_size=1, max_size=3),
    low=st.floats(-3.0, 3.0),
    high=st.floats(-3.0, 3.0),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 8.0]),
    covariance=st.sampled_from(COVARIANCES),
    law=st.sampled_from(LAWS),
    normalised=st.booleans(),
    per_example=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_everything_is_finite_and_no_divergence_negative(
    size, ranks, low, high, spread, covariance, law, normalised, per_example, dtype, seed
):
    shapes = [(rank, 3) for rank in ranks]
    posteriors = [
        random_posterior(
            seed,
            shapes=shapes,
            num_components=size,
            covariance=covariance,
            dirichlet=law,
            normalised=normalised,
            noise="per_example" if per_example else "shared",
            regulariser=estimator,
        ).to(dtype)
        for estimator in ESTIMATORS
    ]
    for posterior in posteriors:
        with torch.no_grad():
            posterior.rho.mul_(spread)
            posterior.eta.copy_(torch.linspace(low, high, posterior.eta.numel()).view_as(posterior.eta))
            posterior.eta.mul_(math.log(10.0))
        draw = posterior.draw(batch_size=2)
        a = torch.cat([part.matrix.flatten() for part in draw.layers])
        parts = posterior.regulariser()
        assert a.dtype == parts.loss.dtype == dtype
        assert torch.isfinite(a).all()
        for value in (parts.kl_pi, parts.kl_sigma, parts.kl_z, parts.coop):
            assert torch.isfinite(value)
            assert value >= 0
        assert parts.coop <= 1 + 1e-5
        for value in (a.square().sum(), parts.kl, parts.coop):
            gradients = torch.autograd.grad(value, (posterior.rho, posterior.eta), allow_unused=True, retain_graph=True)
            assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
        assert all(torch.isfinite(values).all() for values in posterior.moments().values())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_one_component_and_rank_one(covariance, estimator, law):
    posterior = random_posterior(
        shapes=((1, 1), (1, 3)), num_components=1, covariance=covariance, dirichlet=law, regulariser=estimator
    )
    draw = posterior.draw()
    assert torch.equal(draw.squared_norm, torch.ones(2))
    parts = posterior.regulariser()
    assert parts.coop == 1
    assert parts.kl_pi >= 0
    for value in (sum(part.matrix.sum() for part in draw.layers), parts.coop + 0 * posterior.eta.sum()):
        (gradient,) = torch.autograd.grad(value, posterior.eta)
        assert torch.equal(gradient, torch.zeros(2, 1))


def test_scale_zero_is_the_mean():
    posterior = AdapterPosterior([LayerShape("a", 2, 3)], [0.0], PosteriorSettings())
    draw = posterior.draw()
    assert torch.equal(draw.layers[0].matrix, torch.zeros(2, 3))
    gradients = torch.autograd.grad(draw.layers[0].matrix.sum(), (posterior.rho, posterior.eta))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    assert posterior.moments()["noise_std"] == 0


@pytest.mark.parametrize("regulariser", ["expected", "sampled"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_beyond_the_bound_values_are_those_at_it_and_the_gradient_pulls_back(regulariser, sign):
    found = []
    for value in (20.0, 25.0, 1e30):
        posterior = random_posterior(regulariser=regulariser, kl_weight=1.0, coop_weight=0.0)
        with torch.no_grad():
            posterior.rho[0] = sign * value
            posterior.eta[0] = sign * value
            posterior.eta[1, 0] = sign * value
        posterior.draw()
        loss = posterior.regulariser().loss
        loss.backward()
        found.append([loss.detach(), posterior.rho.grad, posterior.eta.grad, *posterior.moments().values()])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    assert all(tensor.isfinite().all() for tensor in found[0])
    _, of_rho, of_eta, *_ = found[0]
    assert sign * of_rho[0] > 0, "a step against the gradient leads back"
    assert sign * of_eta[1, 0] > 0


def test_within_the_bounds_nothing_is_changed_bit_for_bit():
    rho, eta = torch.randn(5, requires_grad=True), torch.tensor([-20.0, -0.0, 1e-30, 20.0], requires_grad=True)
    values = bounded(rho, eta)
    assert torch.equal(values[0], rho)
    assert torch.equal(values[1], eta)
    assert torch.equal(values[1].signbit(), eta.signbit())
    weights = torch.randn(5), torch.randn(4)
    (values[0] @ weights[0] + values[1] @ weights[1]).backward()
    assert torch.equal(rho.grad, weights[0])
    assert torch.equal(eta.grad, weights[1])


def test_the_regulariser_compiles_whole():
    posterior, twin = random_posterior(kl_weight=1.0), random_posterior(kl_weight=1.0)
    compiled = torch.compile(lambda: posterior.regulariser().loss, backend="aot_eager", fullgraph=True)
    expected = twin.regulariser().loss
    torch.testing.assert_close(compiled(), expected)
    compiled().backward()
    expected.backward()
    torch.testing.assert_close(posterior.rho.grad, twin.rho.grad)
    torch.testing.assert_close(posterior.eta.grad, twin.eta.grad)
