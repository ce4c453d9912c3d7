"""The moments of logits against the linearised model's, and the NLL that they give against quadrature."""

import dataclasses

import numpy as np
import pytest
import torch

from monteclora.prediction import laplace_jacobians
from monteclora.prediction.laplace import LaplacePosterior
from monteclora.prediction.laplace_marginals import LogitMoments, logit_moments
from monteclora.prediction.predictive import class_logits
from tests.models import bert
from tests.prediction.rows import padding, rows_of

PRECISIONS = (0.5, 20.0)


def posterior_of(model, structure, names):
    """With eigenvectors and eigenvalues at random."""
    generator = torch.Generator().manual_seed(1)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n in names}
    parts = {}
    for name, shape in shapes.items():
        if structure == "diag":
            parts[name] = torch.rand(shape, generator=generator) * 5
            continue
        for place, size in enumerate(shape):
            parts[f"{name}/vectors.{place}"] = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
            parts[f"{name}/values.{place}"] = torch.rand(size, generator=generator) * 2
    return LaplacePosterior(structure, shapes, parts, prior_precision=1.0, rows=1)


def root_of(posterior, name):
    """Columns: what each entry of standard normal noise becomes in a parameter, (numbers, numbers), float64."""
    shape = posterior.shapes[name]
    basis = torch.eye(torch.Size(shape).numel())
    return torch.stack([posterior.scaled({name: row.reshape(shape)})[name].flatten() for row in basis], 1).double()


@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("most", [25_000_000, 1])
def test_they_are_the_moments_of_the_linearised_draws(structure, most, monkeypatch):
    """All rows' Jacobians together or one row's at a time, and weights that a logit does not depend on."""
    monkeypatch.setattr(laplace_jacobians, "_MOST_NUMBERS", most)
    model = bert().eval()
    names = ("classifier.weight", "classifier.bias", "bert.encoder.layer.1.attention.self.query.weight")
    assert set(names) <= {name for name, _ in model.named_parameters()}
    posterior = posterior_of(model, structure, names)
    rows = rows_of([5, 9, 7])
    before = {name: parameter.requires_grad_(name in names) for name, parameter in model.named_parameters()}
    found = logit_moments(model, posterior, rows, padding(), PRECISIONS)
    assert {name for name, parameter in before.items() if parameter.requires_grad} == set(names)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    weights = [before[name] for name in posterior.shapes]
    for n, row in enumerate(rows):
        logits = class_logits(model, padding()([row]))[0]
        torch.testing.assert_close(logits.detach().double(), found.mean[n], atol=1e-6, rtol=1e-5)
        gradients = [torch.autograd.grad(logit, weights, retain_graph=True) for logit in logits]
        for place, precision in enumerate(PRECISIONS):
            at = dataclasses.replace(posterior, prior_precision=precision)
            expected = 0.0
            for number, name in enumerate(posterior.shapes):
                moved = torch.stack([s[number].flatten() for s in gradients]).double() @ root_of(at, name)
                expected = expected + moved @ moved.T
            torch.testing.assert_close(found.covariance[place, n], expected, atol=1e-6, rtol=1e-4)


def test_the_nll_is_that_of_the_integral():
    variance = 4.0
    # two classes whose logits' difference is N(1, variance)
    covariance = torch.tensor([[[[variance, 0.0], [0.0, 0.0]]]], dtype=torch.float64)
    moments = LogitMoments(torch.tensor([[1.0, 0.0]], dtype=torch.float64), covariance)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    prob = (weights / weights.sum() / (1 + np.exp(-(1.0 + np.sqrt(variance) * nodes)))).sum()
    assert float(moments.nll(torch.tensor([0]))[0, 0]) == pytest.approx(-np.log(prob), abs=0.03)
    sure = dataclasses.replace(moments, covariance=torch.zeros_like(covariance))
    assert float(sure.nll(torch.tensor([0]))[0, 0]) == pytest.approx(np.log1p(np.exp(-1.0)), abs=1e-12)
