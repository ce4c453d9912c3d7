"""Fits of Laplace approximations against closed forms, and what is stored of them."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from monteclora.errors import CheckpointError, DataError
from monteclora.prediction import laplace_fit
from monteclora.prediction.classes import predict_classes
from monteclora.prediction.laplace import Laplace, LaplacePosterior, attach
from monteclora.prediction.laplace_fit import fit_laplace, structure_of
from tests.models import bert, same_global_generators
from tests.prediction.rows import padding, rows_of

CLASSES, WIDTH = 3, 4
WEIGHTS = ("head.weight", "head.bias")


class Head(nn.Module):
    """A linear head on frozen features: the mean of its tokens' embeddings."""

    def __init__(self, seed=0, scale=1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(96, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            self.head.weight.mul_(scale)
            self.head.bias.mul_(scale)

    def features(self, input_ids):
        return self.embedding(input_ids).mean(1)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.head(self.features(input_ids)))


def labelled(count=30):
    rows = rows_of([3 + i % 4 for i in range(count)])
    return [{**row, "labels": i % CLASSES} for i, row in enumerate(rows)]


def collate(rows):
    return {**padding()(rows), "labels": torch.tensor([row["labels"] for row in rows])}


def fitted(model, structure, **kwargs):
    pytest.importorskip("laplace")
    return fit_laplace(model, WEIGHTS, labelled(), collate, classes=CLASSES, structure=structure, **kwargs)


def design(model):
    """Features with a 1 for the bias, float64 (N, D + 1), and the Hessians of -log p in the logits, (N, C, C)."""
    rows = labelled()
    phi = torch.stack([model.features(torch.tensor([row["input_ids"]]))[0] for row in rows]).detach()
    probs = model.head(phi).softmax(-1).detach().double()
    return torch.cat([phi, torch.ones(len(rows), 1)], 1).double(), torch.diag_embed(probs) - torch.einsum(
        "nc,nk->nck", probs, probs
    )


def covariance(posterior):
    """Of the weights and then the biases, from the linear map of the noise."""
    sizes = {name: torch.Size(shape).numel() for name, shape in posterior.shapes.items()}
    columns = []
    for basis in torch.eye(sum(sizes.values())):
        parts = dict(zip(sizes, basis.split(list(sizes.values())), strict=True))
        scaled = posterior.scaled({name: part.reshape(posterior.shapes[name]) for name, part in parts.items()})
        columns.append(torch.cat([scaled[name].flatten() for name in sizes]))
    root = torch.stack(columns, 1).double()
    return root @ root.T


def test_the_diagonal_is_that_of_the_gauss_newton_matrix():
    model = Head()
    phi, hessians = design(model)
    with same_global_generators():
        posterior = fitted(model, "diag")
    expected = torch.einsum("ncc,nd->cd", hessians, phi**2)
    torch.testing.assert_close(posterior.parts["head.weight"].double(), expected[:, :WIDTH], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.parts["head.bias"].double(), expected[:, WIDTH], rtol=1e-5, atol=1e-6)
    precision = torch.cat([expected[:, :WIDTH].flatten(), expected[:, WIDTH]]) + posterior.prior_precision
    torch.testing.assert_close(covariance(posterior), (1 / precision).diag(), rtol=1e-4, atol=1e-8)


def test_the_factors_are_exact_where_every_row_has_the_same_hessian():
    """A head of zeros: all probabilities are 1/C, and the matrix of the weights is H (x) sum of phi phi^T."""
    model = Head(scale=0.0)
    with torch.no_grad():  # the prior's optimum is at infinity for weights of zero
        posterior = dataclasses.replace(fitted(model, "kron"), prior_precision=0.7)
    phi, hessians = design(model)
    features = phi[:, :WIDTH]
    weights = torch.kron(hessians[0], features.T @ features) + 0.7 * torch.eye(CLASSES * WIDTH)
    biases = len(phi) * hessians[0] + 0.7 * torch.eye(CLASSES)
    expected = torch.block_diag(weights.inverse(), biases.inverse())
    torch.testing.assert_close(covariance(posterior), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_the_prior_precision_is_where_the_marginal_likelihood_is_flat(structure):
    """d/d log lambda of log det(H + lambda) - P log lambda + lambda |w|^2 is 0 (MacKay 1992)."""
    model = Head(scale=2.0)
    posterior = fitted(model, structure)
    found, weights = posterior.prior_precision, torch.cat([model.head.weight.flatten(), model.head.bias])
    trace = float(covariance(posterior).trace())
    assert found * float(weights.detach().square().sum()) == pytest.approx(len(weights) - found * trace, rel=0.01)


def test_predictions_have_the_mean_and_variance_of_the_closed_form():
    model = Head()
    posterior = fitted(model, "diag")
    attach(model, posterior)
    (row,), count = rows_of([5]), 4000
    log_probs = predict_classes(model, [row], padding(), sampler=Laplace(count, 3)).log_probs[:, 0]
    ids = torch.tensor([row["input_ids"]])
    phi = torch.cat([model.features(ids)[0], torch.ones(1)]).double().detach()
    variances = covariance(posterior).diag()
    by_class = torch.cat([variances[: CLASSES * WIDTH].reshape(CLASSES, WIDTH), variances[CLASSES * WIDTH :, None]], 1)
    expected = (by_class @ phi**2).numpy()
    # differences to the first class: what a softmax tells of logits
    mean = model(ids).logits[0].detach().double().numpy()
    found = log_probs[:, 1:] - log_probs[:, :1]
    deviation = np.sqrt(expected[1:] + expected[0])
    np.testing.assert_allclose(found.mean(0), mean[1:] - mean[0], atol=4 * deviation.max() / np.sqrt(count))
    np.testing.assert_allclose(found.std(0), deviation, rtol=0.05)  # four standard errors


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_the_batch_size_changes_nothing(structure):
    model = Head()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    told = []
    one, other = fitted(model, structure, batch_size=1), fitted(model, structure, batch_size=30, progress=told.append)
    torch.testing.assert_close(covariance(one), covariance(other), rtol=1e-3, atol=1e-6)
    assert sum(told) == one.rows == 30
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_the_structure_follows_from_the_weights(monkeypatch):
    model = bert()
    heads = ("classifier.weight", "classifier.bias")
    assert structure_of(model, heads) == "kron"
    assert structure_of(model, (*heads, "bert.embeddings.LayerNorm.weight")) == "diag"
    monkeypatch.setattr(laplace_fit, "_MOST_FACTOR_NUMBERS", 100)
    assert structure_of(model, heads) == "diag"


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_curvature_that_is_not_finite_is_refused(structure):
    model = Head()
    model.embedding.weight.data[5:] = torch.inf
    with pytest.raises(DataError, match="no Laplace approximation can be fitted"):
        fitted(model, structure)


def example(structure="kron"):
    shapes = {"head.weight": (2, 3), "head.bias": (2,)}
    if structure == "diag":
        return LaplacePosterior("diag", shapes, {n: torch.rand(s) for n, s in shapes.items()}, 0.5, 7, 1.5, "abc")
    parts = {}
    for name, shape in shapes.items():
        for place, size in enumerate(shape):
            parts |= {f"{name}/vectors.{place}": torch.eye(size), f"{name}/values.{place}": torch.rand(size)}
    return LaplacePosterior("kron", shapes, parts, 0.5, 7, 1.5, "abc")


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_what_is_stored_draws_the_same(structure, tmp_path):
    posterior = example(structure)
    posterior.save(tmp_path / "laplace.safetensors")
    read = LaplacePosterior.load(tmp_path / "laplace.safetensors")
    assert read.facts() == posterior.facts()
    assert read.weights == "abc"
    for name, values in posterior.deviation(2, 5).items():
        assert torch.equal(read.deviation(2, 5)[name], values)
    assert not torch.equal(read.deviation(2, 4)["head.bias"], read.deviation(2, 5)["head.bias"])


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {"parts": {**p.parts, "head.bias/values.0": torch.tensor([-1.0, 1.0])}},
        lambda p: {"parts": {**p.parts, "head.bias/values.0": torch.tensor([torch.nan, 1.0])}},
        lambda p: {"parts": {**p.parts, "head.bias/values.0": torch.ones(3)}},
        lambda p: {"shapes": {"head.weight": (2, 3)}},
        lambda p: {"prior_precision": 0.0},
    ],
)
def test_damaged_files_are_refused(change, tmp_path):
    posterior = example()
    dataclasses.replace(posterior, **change(posterior)).save(tmp_path / "laplace.safetensors")
    with pytest.raises(CheckpointError, match=r"laplace.safetensors cannot be read .* Remove it; it is fitted again"):
        LaplacePosterior.load(tmp_path / "laplace.safetensors")
