"""The linearised logits against forward-mode differentiation, and what a pass leaves behind."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from monteclora.prediction.laplace import Laplace, attach
from monteclora.prediction.laplace_slopes import moved_logits, slopes
from monteclora.prediction.predictive import class_logits, drawn_logits
from tests.models import bert
from tests.prediction.rows import padding, rows_of
from tests.prediction.test_laplace_marginals import posterior_of

NAMES = ("classifier.weight", "classifier.bias", "bert.encoder.layer.1.attention.self.query.weight")


@pytest.mark.parametrize("rows", [1, 3])
def test_draws_are_those_of_forward_mode_differentiation(rows):
    model = bert().eval()
    posterior = posterior_of(model, "kron", NAMES)
    batch = padding()(rows_of([5, 9, 7][:rows]))
    parameters = dict(model.named_parameters())
    point = {name: parameters[name].detach() for name in NAMES}

    def logits(weights):
        return torch.func.functional_call(model, weights, (), dict(batch)).logits

    expected = []
    for number in range(4):
        direction = posterior.deviation(3, number)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
            value, slope = torch.func.jvp(logits, (point,), ({name: direction[name] for name in NAMES},))
        expected.append(value + slope)
    attach(model, posterior)
    found = drawn_logits(model, batch, Laplace(4, seed=3))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
    for number, each in enumerate(expected):
        with Laplace(4, seed=3).draw(model, number), torch.no_grad():
            torch.testing.assert_close(class_logits(model, batch), each, atol=1e-5, rtol=1e-5)


def test_weights_without_a_part_in_the_logits_have_slopes_of_zero():
    used, unused = torch.tensor([2.0, 3.0], requires_grad=True), torch.ones(4, requires_grad=True)
    first, second = slopes(used.square(), [used, unused])
    torch.testing.assert_close(first, torch.tensor([[4.0, 0.0], [0.0, 6.0]]))
    torch.testing.assert_close(second, torch.zeros(2, 4))


def test_reduced_precision_moves_them_little_and_casts_are_not_kept():
    point = {"w": torch.randn(3, 16, generator=torch.Generator().manual_seed(0))}
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    moves = [{"w": torch.full((3, 16), 0.1)}, {"w": torch.zeros(3, 16, dtype=torch.float64)}]

    def logits_of(weights, row):
        return torch.nn.functional.linear(x[row], weights["w"])

    expected = torch.stack([x @ (point["w"] + move["w"].float()).T for move in moves])
    torch.testing.assert_close(moved_logits(logits_of, point, moves, 5), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = moved_logits(logits_of, point, moves, 5)
        assert torch.is_autocast_cache_enabled()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)
    assert not point["w"].requires_grad
