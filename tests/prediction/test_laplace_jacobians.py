"""The linearised logits against forward-mode differentiation, and what a pass leaves behind."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from monteclora.prediction import laplace_jacobians
from monteclora.prediction.laplace import Laplace, attach
from monteclora.prediction.laplace_jacobians import jacobians, moved_logits
from monteclora.prediction.predictive import class_logits, drawn_logits
from tests.models import bert
from tests.prediction.rows import padding, rows_of
from tests.prediction.test_laplace_marginals import posterior_of

LINEAR = ("classifier.weight", "classifier.bias", "bert.encoder.layer.1.attention.self.query.weight")
OTHERS = (*LINEAR, "bert.embeddings.LayerNorm.weight", "bert.embeddings.position_embeddings.weight")


@pytest.mark.parametrize("names", [LINEAR, OTHERS], ids=["linear", "others"])
@pytest.mark.parametrize("most", [25_000_000, 1])
def test_draws_are_those_of_forward_mode_differentiation(names, most, monkeypatch):
    monkeypatch.setattr(laplace_jacobians, "_MOST_NUMBERS", most)
    model = bert().eval()
    posterior = posterior_of(model, "diag", names)
    batch = padding()(rows_of([5, 9, 7, 4]))
    parameters = dict(model.named_parameters())
    point = {name: parameters[name].detach() for name in names}

    def logits(weights):
        return torch.func.functional_call(model, weights, (), dict(batch)).logits

    expected = []
    for number in range(3):
        direction = posterior.deviation(3, number)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
            value, change = torch.func.jvp(logits, (point,), ({name: direction[name] for name in names},))
        expected.append(value + change)
    attach(model, posterior)
    found = drawn_logits(model, batch, Laplace(3, seed=3))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
    for number, each in enumerate(expected):
        with Laplace(3, seed=3).draw(model, number), torch.no_grad():
            torch.testing.assert_close(class_logits(model, batch), each, atol=1e-4, rtol=1e-5)


class Twice(nn.Module):
    """Uses a layer twice, and a weight of one outside of it where that is asked for."""

    def __init__(self, outside):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.unused = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)
        self.outside = outside

    def forward(self, x):
        found = self.body(self.body(x).tanh())
        return self.head(found.tanh()) + (self.head.weight.sum() * x.sum(-1, keepdim=True) if self.outside else 0)


@pytest.mark.parametrize("outside", [False, True])
def test_jacobians_are_those_of_each_row_however_the_weights_are_used(outside):
    model, x = Twice(outside), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    weights = dict(model.named_parameters())
    passes = []

    def logits_of(some):
        passes.append(len(x[some]))
        return model(x[some])

    parts = list(jacobians(model, weights, logits_of, 5))
    assert passes == ([1, 1, 1, 1, 1, 1] if outside else [1, 4])  # nothing of the first row is right
    logits = torch.cat([each for each, _ in parts])
    torch.testing.assert_close(logits, model(x).detach())
    expected = torch.func.jacrev(lambda given: torch.func.functional_call(model, given, (x,)))(weights)
    for name in weights:
        torch.testing.assert_close(torch.cat([found[name] for _, found in parts]), expected[name].detach())


def test_reduced_precision_moves_them_little_and_casts_are_not_kept():
    model, x = nn.Linear(16, 3), torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    weights = {"weight": torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()}
    moves = [{"weight": torch.full((3, 16), 0.1)}, {"weight": torch.zeros(3, 16, dtype=torch.float64)}]

    def logits_of(some):
        return torch.func.functional_call(model, weights, (x[some],))

    with torch.no_grad():
        expected = torch.stack([x @ (weights["weight"] + move["weight"].float()).T + model.bias for move in moves])
    torch.testing.assert_close(moved_logits(model, weights, logits_of, moves, 5), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = moved_logits(model, weights, logits_of, moves, 5)
        assert torch.is_autocast_cache_enabled()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)
    assert weights["weight"].grad is None
