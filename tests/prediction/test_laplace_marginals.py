"""The moments of logits against draws of the linearised model, and the NLL that they give against quadrature."""

import dataclasses

import numpy as np
import pytest
import torch

from monteclora.prediction.laplace import Laplace, LaplacePosterior, attach
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


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_they_are_the_moments_of_the_draws(structure):
    model = bert().eval()
    names = ("classifier.weight", "classifier.bias", "bert.encoder.layer.1.attention.self.query.weight")
    assert set(names) <= {name for name, _ in model.named_parameters()}
    posterior = posterior_of(model, structure, names)
    rows = rows_of([5, 9])
    found = logit_moments(model, posterior, rows, padding(), PRECISIONS)
    assert not any(p.grad is not None for p in model.parameters())
    for place, precision in enumerate(PRECISIONS):
        attach(model, dataclasses.replace(posterior, prior_precision=precision))
        sampler = Laplace(400)
        for n, row in enumerate(rows):
            batch = padding()([row])
            with torch.no_grad():
                torch.testing.assert_close(class_logits(model, batch)[0].double(), found.mean[n], atol=1e-5, rtol=1e-5)
                drawn = []
                for number in range(sampler.num_samples):
                    with sampler.draw(model, number):
                        drawn.append(class_logits(model, batch)[0].double())
            got = torch.cov(torch.stack(drawn).T)
            expected = found.covariance[place, n]
            scale = expected.diagonal().mean()
            torch.testing.assert_close(got / scale, expected / scale, atol=0.25, rtol=0)


def test_the_nll_is_that_of_the_integral():
    variance = 4.0
    # two classes whose logits' difference is N(1, variance)
    covariance = torch.tensor([[[[variance, 0.0], [0.0, 0.0]]]], dtype=torch.float64)
    moments = LogitMoments(torch.tensor([[1.0, 0.0]], dtype=torch.float64), covariance)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    prob = (weights / weights.sum() / (1 + np.exp(-(1.0 + np.sqrt(variance) * nodes)))).sum()
    assert float(moments.nll(torch.tensor([0]))[0]) == pytest.approx(-np.log(prob), abs=0.03)
    sure = dataclasses.replace(moments, covariance=torch.zeros_like(covariance))
    assert float(sure.nll(torch.tensor([0]))[0]) == pytest.approx(np.log1p(np.exp(-1.0)), abs=1e-12)
