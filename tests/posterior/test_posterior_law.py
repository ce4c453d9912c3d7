"""What a posterior draws, layer by layer, against the N-draw sampler and the closed forms."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from monteclora.posterior import dirichlet, noise, wishart
from tests.posterior import formulas
from tests.posterior.building import (
    LAWS,
    posterior_of,
    random_posterior,
    raw_normals,
    reference_statistics,
    stacked_noise,
    statistics,
)
from tests.posterior.checks import COUNT, SEEDS, assert_law, assert_mean
from tests.reference import Law, name_of

CPU = torch.device("cpu")


def other(law: Law) -> Law:
    """Another shape, scale and law, with the same settings."""
    dof = 1 if law.dof == len(law.rho) else law.dof
    return replace(law, rho=(-0.4,), alpha=(3.0, 0.7, 1.0, 0.2), scale=0.2, dof=dof, columns=5)


def check_layers(law: Law, seed: int, *, count: int = COUNT, factor: float = 1.0) -> None:
    """Prediction draws of a posterior whose layers are of two kinds in turn, both kinds against the reference."""
    laws, times = (law, other(law)), 100
    layers = count // times
    posterior = posterior_of(laws * layers)
    posterior.scale *= factor
    draw = posterior.sample(seed, 0, times)
    for first, expected in enumerate(laws):
        for name, values in statistics(stacked_noise(draw, slice(first, None, 2))).items():
            assert_law(values, reference_statistics(expected)[name], f"layers {first}, {first + 2}, ...: {name}")


@pytest.mark.parametrize("law", LAWS, ids=name_of)
def test_every_layers_draws_have_the_law_of_the_n_draw_sampler(law):
    check_layers(law, 1, count=COUNT // 10 if law.full else COUNT)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=name_of)
@pytest.mark.parametrize("seed", SEEDS)
def test_with_all_draws_and_three_seeds(seed, law):
    check_layers(law, seed)


@pytest.mark.parametrize(("seed", "factor"), [(1, 0.98), (2, 1.02), (3, 1.02)])
def test_two_percent_in_the_scale_are_noticed(seed, factor):
    with pytest.raises(AssertionError, match="Kolmogorov"):
        check_layers(LAWS[0], seed, factor=factor)


def test_training_draws_have_the_law_of_prediction_draws():
    law = LAWS[0]
    posterior = posterior_of([law] * 2000)
    a = np.concatenate([stacked_noise(posterior.draw()) for _ in range(25)])
    for name, values in statistics(a).items():
        assert_law(values, reference_statistics(law)[name], name)


@pytest.mark.parametrize("normalised", [True, False])
def test_full_covariance_is_composed_of_its_three_streams(normalised):
    """A = eps ||pi|| diag(exp(rho)) sqrt(c/nu) T Xi, with each layer's own T, Xi and pi."""
    shapes = ((2, 5), (3, 4), (2, 7))
    posterior = random_posterior(3, shapes=shapes, covariance="full", normalised=normalised)
    posterior.draws = 11
    draw = posterior.draw(process=2)

    def generator(kind: noise.Kind) -> torch.Generator:
        return noise.generator(3, 2, 11, kind, CPU)

    cells = raw_normals(posterior, generator(noise.Kind.NORMAL))
    xi = [block.t() for block in posterior._layout.transposed_blocks(cells)]
    stream = generator(noise.Kind.WISHART)
    twos = iter(wishart.raw_bartlett(2, 2, 2, cells, stream))
    threes = iter(wishart.raw_bartlett(3, 3, 1, cells, stream))
    weights = dirichlet.raw(posterior.eta, "exact", generator(noise.Kind.DIRICHLET))
    pi = formulas.weights(posterior.eta, weights)
    row = 0
    for i, (rank, _) in enumerate(shapes):
        t = next(twos if rank == 2 else threes)
        root = formulas.wishart_factor(posterior.rho[row : row + rank], t, float(rank), normalised=normalised)
        expected = posterior.scale[i] * pi[i].norm() * root @ xi[i]
        torch.testing.assert_close(draw.layers[i].matrix, expected)
        sigma = root @ root.mT / (2 * posterior.rho[row : row + rank]).exp()
        torch.testing.assert_close(draw.row_squared_norm[row : row + rank], sigma.diagonal())
        total = draw.row_log_determinant[row : row + rank].sum() + 2 * posterior.rho[row : row + rank].sum()
        torch.testing.assert_close(total, torch.logdet(root @ root.mT), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(draw.squared_norm[i], pi[i].square().sum())
        row += rank


@pytest.mark.parametrize("law", [LAWS[0], LAWS[1], replace(LAWS[4], dof=6)], ids=name_of)
def test_moments_are_those_of_the_draws_in_every_layer(law):
    laws = [law, other(law)]
    posterior = posterior_of(laws)
    moments = {name: values.tolist() for name, values in posterior.moments().items()}
    many = posterior_of(laws * 500)
    draw = many.sample(1, 0, 40)
    squared_norm = torch.stack([many.draw().squared_norm for _ in range(10)])
    for i, one in enumerate(laws):
        assert_mean(stacked_noise(draw, slice(i, None, 2)).__pow__(2).mean((1, 2)), moments["noise_std"][i] ** 2)
        assert_mean(squared_norm[:, i::2].flatten(), moments["squared_norm"][i])
        alpha = np.array(one.alpha)
        expected = (alpha * (alpha + 1)).sum() / (alpha.sum() * (alpha.sum() + 1))
        c = 1.0 if one.normalised else one.dof
        assert moments["squared_norm"][i] == pytest.approx(expected, rel=1e-5)
        variance = one.scale**2 * expected * c * np.mean(np.exp(2 * np.array(one.rho)))
        assert moments["noise_std"][i] == pytest.approx(variance**0.5, rel=1e-5)


# -- flipout -------------------------------------------------------------------------------------------------------


def effective(draw, every: slice) -> np.ndarray:
    """``A_b - mu = Delta o (s_b u_b^T)`` of every layer and example: shape (layers, B, r, n)."""
    into = torch.stack([part.sign_in for part in draw.layers[every]])
    out = torch.stack([part.sign_out for part in draw.layers[every]])
    delta = torch.from_numpy(stacked_noise(draw, every)).unsqueeze(1)
    return (delta * out.unsqueeze(-1) * into.unsqueeze(-2)).numpy()


@pytest.mark.parametrize("law", [LAWS[0], LAWS[4]], ids=name_of)
def test_every_examples_own_a_has_the_law_of_a_shared_draw(law):
    laws = (law, other(law))
    posterior = posterior_of(laws * 1000, noise="per_example")
    draws = [posterior.draw(batch_size=2) for _ in range(15)]
    for first, expected in enumerate(laws):
        a = np.concatenate([effective(draw, slice(first, None, 2)) for draw in draws])
        for example in range(2):
            for name, values in statistics(a[:, example]).items():
                assert_law(values, reference_statistics(expected)[name], f"example {example}: {name}")
        assert_mean((a[:, 0] * a[:, 1]).reshape(len(a), -1), 0.0, "covariance of two examples")


def test_signs_are_fair_and_independent():
    posterior = random_posterior(noise="per_example", shapes=((2, 5), (3, 4)))
    batches = [posterior.draw(batch_size=64) for _ in range(300)]
    signs = []
    for draw in batches:
        row = [sign for part in draw.layers for sign in (part.sign_in, part.sign_out)]
        assert [tuple(sign.shape) for sign in row] == [(64, 5), (64, 2), (64, 4), (64, 3)]
        signs.append(torch.cat(row, dim=1))
    each = torch.stack(signs)
    assert each.abs().min() == each.abs().max() == 1
    assert_mean(each.flatten(0, 1), 0.0, "balance")
    flat = each.flatten(0, 1)
    for i, j in itertools.combinations(range(flat.shape[1]), 2):
        assert_mean(flat[:, i] * flat[:, j], 0.0, "coordinates")
    assert_mean((each[:, :-1] * each[:, 1:]).flatten(0, 1), 0.0, "neighbouring examples")
    assert_mean((each[:-1] * each[1:]).flatten(0, 1), 0.0, "the same example in the next batch")


@pytest.mark.parametrize("batch_size", [0, 2, 3, 17])
def test_signs_of_any_batch_size(batch_size):
    draw = random_posterior(noise="per_example").draw(batch_size=batch_size)
    for part in draw.layers:
        assert part.sign_in.shape == (batch_size, part.matrix.shape[1])
        assert part.sign_out.shape == (batch_size, part.matrix.shape[0])


def test_a_single_example_needs_no_signs():
    draw, shared = random_posterior(noise="per_example").draw(batch_size=1), random_posterior().draw()
    for part, other in zip(draw.layers, shared.layers, strict=True):
        assert part.sign_in is part.sign_out is None
        assert torch.equal(part.matrix, other.matrix)
