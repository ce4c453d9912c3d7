"""What torch's private names are taken for: a release that changes one fails here, by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monteclora.posterior.torch_private import (
    COMPILED,
    MovableModule,
    add_to_each,
    in_backward,
    original,
    parameters_of,
    parts_of,
    standard_gamma,
    standard_gamma_derivative,
    versions,
)


def test_gamma_draws_follow_their_generator_and_have_their_moments() -> None:
    shape = torch.full((200_000,), 2.5, dtype=torch.float64)
    draws = [standard_gamma(shape, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    # mean and variance are the shape; five standard errors
    assert abs(draws[0].mean() - 2.5) < 5 * (2.5 / 200_000) ** 0.5
    assert abs(draws[0].var() - 2.5) < 5 * ((6 * 2.5 + 2 * 2.5**2) / 200_000) ** 0.5


def test_the_derivative_is_that_of_the_inverse_distribution_function() -> None:
    shape = torch.tensor([0.7, 1.0, 3.0], dtype=torch.float64)
    draw = torch.tensor([0.4, 1.5, 2.0], dtype=torch.float64)
    step = 1e-6
    above, below = (torch.special.gammainc(shape + sign * step, draw) for sign in (1, -1))
    density = torch.distributions.Gamma(shape, 1.0).log_prob(draw).exp()
    # F(x(a), a) is constant, so dx/da = -(dF/da) / f(x); torch approximates it to some 1e-4
    expected = -(above - below) / (2 * step) / density
    torch.testing.assert_close(standard_gamma_derivative(shape, draw), expected, rtol=1e-3, atol=0)


def test_each_tensor_gets_its_own_summand() -> None:
    tensors = [torch.ones(2), torch.zeros(3, 1)]
    add_to_each(tensors, [torch.tensor([1.0, 2.0]), torch.full((3, 1), 5.0)])
    assert [tensor.flatten().tolist() for tensor in tensors] == [[2.0, 3.0], [5.0] * 3]


def test_recomputation_knows_that_it_is_inside_a_backward_pass() -> None:
    seen: list[bool] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        seen.append(in_backward())
        return x.square()

    x = torch.ones(2, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert seen == [False, True]
    assert not in_backward()


def test_a_tensors_version_counts_what_was_done_to_it_in_place() -> None:
    one, two = torch.zeros(2), torch.zeros(2)
    before = versions([one, two])
    one.add_(1.0)
    after = versions([one, two])
    assert after[0] > before[0]
    assert after[1] == before[1]


def test_the_dictionaries_of_a_module() -> None:
    linear = nn.Linear(2, 3, bias=False)
    assert parts_of(nn.Sequential(linear))["0"] is linear
    assert parameters_of(linear)["weight"] is linear.weight
    assert parameters_of(linear).get("other") is None
    assert parameters_of(linear)["bias"] is None


class Stubborn(MovableModule):
    """Keeps its parameter in single precision, and counts conversions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.conversions = 0

    def converted(self, before: Tensor, after: Tensor) -> Tensor:
        return before

    def after_conversion(self) -> None:
        self.conversions += 1


def test_a_module_has_a_say_in_every_conversion() -> None:
    stubborn, plain = Stubborn(), MovableModule()
    plain.register_buffer("value", torch.ones(1))
    model = nn.Sequential(nn.Linear(2, 2), stubborn, plain)
    for convert in (model.double, model.half, lambda: model.to(torch.bfloat16), lambda: model.to_empty(device="cpu")):
        convert()
    assert stubborn.conversions == 4
    assert stubborn.weight.dtype == torch.float32
    assert plain.value.dtype == torch.bfloat16


def test_the_module_in_a_compiled_one_and_its_part_in_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(model)
    assert original(compiled) is original(model) is model
    assert {name for name, _ in compiled.named_parameters()} == {f"{COMPILED}.0.weight", f"{COMPILED}.0.bias"}
