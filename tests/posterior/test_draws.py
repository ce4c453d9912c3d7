"""Draws with the means in them: A itself, whose gradient is that of the mean, and the noise's that of rho and eta."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monteclora.posterior import AdapterPosterior
from tests.posterior.building import random_posterior

SHAPES = ((2, 5), (3, 4), (1, 7), (3, 5))


def means(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
    return [mean.to(dtype).requires_grad_() for mean in drawn]


def posterior(**settings: str) -> AdapterPosterior:
    return random_posterior(2, shapes=SHAPES, **settings).double()


def loss(matrices: list[Tensor]) -> Tensor:
    """A function that treats every cell differently."""
    return sum((matrix.sin() * torch.arange(1.0, matrix.numel() + 1).view_as(matrix)).sum() for matrix in matrices)


def gradients(one: AdapterPosterior, mu: list[Tensor]) -> list[Tensor | None]:
    return [one.rho.grad, one.eta.grad, *(mean.grad for mean in mu)]


@pytest.mark.parametrize("law", ["exact", "laplace"])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_values_and_gradients_are_those_of_adding_the_mean_afterwards(covariance, law):
    inside, outside = (posterior(covariance=covariance, dirichlet=law) for _ in range(2))
    mu_inside, mu_outside = means(), means()
    drawn, added = inside.draw(means=mu_inside), outside.draw()
    assert all(part.has_mean for part in drawn.layers)
    assert not any(part.has_mean for part in added.layers)
    sums = [mean + part.matrix for mean, part in zip(mu_outside, added.layers, strict=True)]
    torch.testing.assert_close([part.matrix for part in drawn.layers], sums)
    loss([part.matrix for part in drawn.layers]).backward()
    loss(sums).backward()
    torch.testing.assert_close(gradients(inside, mu_inside), gradients(outside, mu_outside))


def test_means_of_lower_precision_are_added_in_the_noises_and_keep_their_own():
    one, mu = random_posterior(2, shapes=SHAPES), means(torch.bfloat16)
    drawn, noise = one.draw(means=mu), random_posterior(2, shapes=SHAPES).draw()
    for mean, part, other in zip(mu, drawn.layers, noise.layers, strict=True):
        assert part.matrix.dtype == torch.float32
        torch.testing.assert_close(part.matrix, mean.float() + other.matrix)
    loss([part.matrix for part in drawn.layers]).backward()
    assert all(mean.grad.dtype == torch.bfloat16 for mean in mu)


def test_layers_are_passed_one_by_one_as_often_as_one_likes():
    one, mu = posterior(), means()
    drawn = one.draw(means=mu)
    drawn.layers[1].matrix.square().sum().backward()
    assert [mean.grad is not None for mean in mu] == [False, True, False, False]
    once = gradients(one, mu)
    first = [once[0].clone(), once[1].clone(), once[3].clone()]
    drawn.layers[1].matrix.square().sum().backward()
    torch.testing.assert_close([one.rho.grad, one.eta.grad, mu[1].grad], [2 * value for value in first])
    drawn.layers[3].matrix.sum().backward()
    assert mu[3].grad is not None
    torch.testing.assert_close(one.rho.grad[:6], 2 * first[0][:6])
    assert one.rho.grad[6:].abs().min() > 0


@pytest.mark.parametrize("frozen", ["rho and eta", "means", "one mean"])
def test_what_is_frozen_gets_no_gradient_and_the_others_their_own(frozen):
    whole, part = posterior(), posterior()
    mu_whole, mu_part = means(), means()
    chosen = {"rho and eta": [part.rho, part.eta], "means": mu_part, "one mean": mu_part[1:2]}[frozen]
    for tensor in chosen:
        tensor.requires_grad_(False)
    for one, mu in ((whole, mu_whole), (part, mu_part)):
        loss([layer.matrix for layer in one.draw(means=mu).layers]).backward()
    tensors = [part.rho, part.eta, *mu_part]
    for tensor, expected in zip(tensors, gradients(whole, mu_whole), strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, expected)
        else:
            assert tensor.grad is None


def test_nothing_is_differentiated_where_nothing_needs_it():
    one, mu = posterior(), means()
    with torch.no_grad():
        assert not one.draw(means=mu).layers[0].matrix.requires_grad
    one.requires_grad_(False)
    for mean in mu:
        mean.requires_grad_(False)
    assert not one.draw(means=mu).layers[0].matrix.requires_grad


@pytest.mark.parametrize("frozen", [False, True])
def test_means_that_changed_before_the_backward_pass_are_noticed(frozen):
    one, mu = posterior(), means()
    one.requires_grad_(not frozen)
    drawn = one.draw(means=mu)
    with torch.no_grad():
        mu[2].add_(1.0)
    with pytest.raises(RuntimeError, match="lora_A was modified in place"):
        loss([part.matrix for part in drawn.layers]).backward()


def test_per_example_noise_leaves_the_means_to_the_layers():
    drawn = posterior(noise="per_example").draw(batch_size=2, means=means())
    assert not any(part.has_mean for part in drawn.layers)


def test_a_second_derivative_is_refused_and_not_wrong():
    one, mu = posterior(), means()
    (gradient,) = torch.autograd.grad(loss([p.matrix for p in one.draw(means=mu).layers]), one.rho, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
