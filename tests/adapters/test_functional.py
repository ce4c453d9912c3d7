"""The fused operation against plain autograd on ``A = mu + eps ||pi|| L Xi`` written out."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from monteclora.adapters.functional import drawn_lora, grouped_lora
from monteclora.errors import ConfigError
from monteclora.posterior import AdapterPosterior, LayerShape, PosteriorSettings, dirichlet, noise, wishart
from tests.posterior import formulas
from tests.posterior.building import raw_normals

BATCH, LENGTH, IN, OUT, RANK, COMPONENTS = 3, 4, 6, 5, 3, 4
SHAPES = [LayerShape("before", 2, 4), LayerShape("layer", RANK, IN), LayerShape("after", 5, 3)]
LAYER = 1  # not the first one: offsets into the flat buffers matter
ROWS = slice(2, 2 + RANK)
SCALES = [0.25, 0.75, 0.5]  # exact in float32
SCALING = 1.5


class Problem(NamedTuple):
    posterior: AdapterPosterior
    inputs: dict[str, Tensor]

    def leaves(self) -> dict[str, Tensor]:
        """Everything that can have a gradient, by name."""
        return {**self.inputs, "rho": self.posterior.rho, "eta": self.posterior.eta}


def problem(*, per_example: bool = False, covariance: str = "diagonal", law: str = "exact") -> Problem:
    settings = PosteriorSettings(
        num_components=COMPONENTS,
        covariance=covariance,
        dirichlet=law,
        noise="per_example" if per_example else "shared",
    )
    posterior = AdapterPosterior(SHAPES, SCALES, settings, seed=5).double()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    with torch.no_grad():
        posterior.rho.copy_(0.5 * normal(10))
        posterior.eta.copy_(0.5 * normal(3, COMPONENTS))
    inputs = {
        "x": normal(BATCH, LENGTH, IN).requires_grad_(),
        "result": normal(BATCH, LENGTH, OUT).requires_grad_(),
        "mu": normal(RANK, IN).requires_grad_(),
        "b": normal(OUT, RANK).requires_grad_(),
    }
    return Problem(posterior, inputs)


def noise_of_a(posterior: AdapterPosterior, rho: Tensor, eta: Tensor, index: int = 0) -> Tensor:
    """``eps ||pi|| L Xi`` line by line (docs/method.md section 2), from the raw numbers of the noise stream."""
    s, device = posterior.settings, torch.device("cpu")

    def stream(kind: noise.Kind) -> torch.Generator:
        return noise.generator(posterior.seed, 0, index, kind, device)

    xi = posterior._layout.transposed_blocks(raw_normals(posterior, stream(noise.Kind.NORMAL)))[LAYER].t()
    spread = rho[ROWS].exp().unsqueeze(-1)
    if s.covariance == "diagonal":
        chi_square = wishart.raw_chi_square(posterior._nu, stream(noise.Kind.WISHART))[ROWS]
        drawn = spread * chi_square.sqrt().unsqueeze(-1) * xi
    else:
        generator = stream(noise.Kind.WISHART)
        wishart.raw_bartlett(float(SHAPES[0].rank), SHAPES[0].rank, 1, posterior.rho, generator)
        drawn = (spread * wishart.raw_bartlett(float(RANK), RANK, 1, posterior.rho, generator)[0]) @ xi
    raw = dirichlet.raw(posterior.eta, s.dirichlet, stream(noise.Kind.DIRICHLET))
    pi = formulas.weights(eta, raw)[LAYER]
    return SCALES[LAYER] * torch.linalg.vector_norm(pi) * drawn / RANK**0.5  # normalised: nu = r


def written_out(posterior: AdapterPosterior, leaves: dict[str, Tensor], index: int = 0) -> Tensor:
    """The layer with ``A`` formed and differentiated by autograd; per example, every example has an A of its own."""
    delta = noise_of_a(posterior, leaves["rho"], leaves["eta"], index)
    x, current = leaves["x"], posterior.current
    assert current is not None
    layer = current.layers[LAYER]
    if layer.sign_in is None or layer.sign_out is None:
        hidden = x @ (leaves["mu"] + delta).t()
    else:
        signs = [torch.outer(out, into) for out, into in zip(layer.sign_out, layer.sign_in, strict=True)]
        hidden = torch.stack([x[b] @ (leaves["mu"] + delta * signs[b]).t() for b in range(BATCH)])
    return leaves["result"] + SCALING * hidden @ leaves["b"].t()


def fused(posterior: AdapterPosterior, leaves: dict[str, Tensor]) -> Tensor:
    draw = posterior.current
    assert draw is not None
    return drawn_lora(leaves["x"], leaves["result"], leaves["mu"], leaves["b"], draw.layers[LAYER], SCALING)


LAWS = list(itertools.product([False, True], ["diagonal", "full"], ["exact", "laplace"]))


@pytest.mark.parametrize(("per_example", "covariance", "law"), LAWS)
def test_value_and_every_gradient_equal_plain_autograd(per_example: bool, covariance: str, law: str) -> None:
    posterior, inputs = case = problem(per_example=per_example, covariance=covariance, law=law)
    posterior.draw(batch_size=BATCH)
    leaves = case.leaves()
    ours, plain = fused(posterior, inputs), written_out(posterior, leaves)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected = torch.autograd.grad(plain, [*leaves.values()], upstream)
    found = torch.autograd.grad(ours, [*leaves.values()], upstream)
    for name, one, other in zip(leaves, found, expected, strict=True):
        assert one.abs().max() > 0, f"the gradient of {name} is zero: nothing was compared"
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


NAMES = ("x", "result", "mu", "b", "rho", "eta")
SUBSETS = [c for size in range(1, 7) for c in itertools.combinations(NAMES, size)]


@pytest.mark.parametrize("per_example", [False, True])
def test_every_combination_of_tensors_that_need_a_gradient(per_example: bool) -> None:
    posterior, inputs = case = problem(per_example=per_example)
    posterior.draw(batch_size=BATCH)
    leaves = case.leaves()
    gradients = torch.autograd.grad(written_out(posterior, leaves).square().sum(), [*leaves.values()])
    expected = dict(zip(NAMES, gradients, strict=True))
    for subset in SUBSETS:
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in subset)
            leaf.grad = None
        posterior.draws = 0
        posterior.draw(batch_size=BATCH)
        fused(posterior, inputs).square().sum().backward()
        for name in subset:
            torch.testing.assert_close(leaves[name].grad, expected[name], msg=lambda m, s=subset: f"{s}: {m}")
        assert all(leaf.grad is None for name, leaf in leaves.items() if name not in subset)


@pytest.mark.parametrize("per_example", [False, True])
def test_gradcheck(per_example: bool) -> None:
    # the Laplace law is smooth in eta under the same random numbers, so finite differences apply to all six inputs
    case = problem(per_example=per_example, law="laplace")

    def function(*values: Tensor) -> Tensor:
        inputs = dict(zip(NAMES, values, strict=True))
        copy = problem(per_example=per_example, law="laplace").posterior
        del copy.rho, copy.eta
        copy.rho, copy.eta = inputs["rho"], inputs["eta"]
        copy.draw(batch_size=BATCH)
        return fused(copy, inputs)

    assert torch.autograd.gradcheck(function, tuple(case.leaves().values()))


@pytest.mark.parametrize("shape", [(IN,), (7, IN), (3, 5, IN), (2, 3, 2, IN), (0, IN), (2, 0, IN)])
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    posterior, inputs = case = problem()
    posterior.draw()
    x = torch.randn(shape, dtype=torch.float64)
    result = torch.randn(*shape[:-1], OUT, dtype=torch.float64)
    ours = fused(posterior, {**inputs, "x": x, "result": result})
    assert ours.shape == result.shape
    torch.testing.assert_close(ours, written_out(posterior, {**case.leaves(), "x": x, "result": result}))
    ours.sum().backward()


def test_inputs_that_are_not_contiguous() -> None:
    posterior, inputs = case = problem()
    posterior.draw()
    x = torch.randn(LENGTH, IN, BATCH, dtype=torch.float64).permute(2, 0, 1)
    result = torch.randn(OUT, BATCH, LENGTH, dtype=torch.float64).permute(1, 2, 0)
    expanded = torch.randn(1, 1, OUT, dtype=torch.float64).expand(BATCH, LENGTH, OUT)
    for out in (result, expanded):
        ours = fused(posterior, {**inputs, "x": x, "result": out})
        torch.testing.assert_close(ours, written_out(posterior, {**case.leaves(), "x": x, "result": out}))


@pytest.mark.parametrize("shape", [(BATCH * LENGTH, IN), (BATCH, IN), (BATCH, 2, 2, IN)])
def test_per_example_noise_with_other_input_ranks(shape: tuple[int, ...]) -> None:
    posterior, inputs = case = problem(per_example=True)
    posterior.draw(batch_size=BATCH)
    x = torch.randn(shape, dtype=torch.float64)
    result = torch.randn(*shape[:-1], OUT, dtype=torch.float64)
    ours = fused(posterior, {**inputs, "x": x, "result": result})
    by_example = {"x": x.reshape(BATCH, -1, IN), "result": result.reshape(BATCH, -1, OUT)}
    torch.testing.assert_close(ours, written_out(posterior, {**case.leaves(), **by_example}).reshape(ours.shape))


@pytest.mark.parametrize("shape", [(IN,), (BATCH + 1, LENGTH, IN), (BATCH * LENGTH + 1, IN)])
def test_per_example_noise_refuses_regrouped_inputs(shape: tuple[int, ...]) -> None:
    posterior, inputs = problem(per_example=True)
    posterior.draw(batch_size=BATCH)
    result = torch.zeros(*shape[:-1], OUT, dtype=torch.float64)
    with pytest.raises(ConfigError, match="per_example") as caught:
        fused(posterior, {**inputs, "x": torch.zeros(shape, dtype=torch.float64), "result": result})
    assert "shared" in caught.value.hint


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close_to_exact(dtype: torch.dtype, per_example: bool) -> None:
    posterior, inputs = case = problem(per_example=per_example)
    posterior.draw(batch_size=BATCH)
    leaves = case.leaves()
    plain = written_out(posterior, leaves)
    expected = dict(zip(NAMES, torch.autograd.grad(plain.sum(), [*leaves.values()]), strict=True))
    low = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
    ours = fused(posterior, low)
    assert ours.dtype == dtype
    ours.sum().backward()
    tolerance = 0.06 if dtype == torch.bfloat16 else 0.008
    assert (ours.double() - plain).abs().max() < tolerance * plain.abs().max()
    for name, leaf in {**leaves, **low}.items():
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        error = (leaf.grad.double() - expected[name]).abs().max()
        assert error < 2 * tolerance * expected[name].abs().max(), name


def test_two_forwards_before_one_backward_keep_their_own_draws() -> None:
    posterior, inputs = case = problem()
    leaves = case.leaves()
    ours, plain = [], []
    for index in range(2):
        posterior.draw()
        ours.append(fused(posterior, inputs))
        plain.append(written_out(posterior, leaves, index))
    assert (ours[0] - ours[1]).abs().max() > 1e-2
    found = torch.autograd.grad(sum(ours).square().sum(), [*leaves.values()])
    expected = torch.autograd.grad(sum(plain).square().sum(), [*leaves.values()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_grouped_draws_equal_separate_ones() -> None:
    posterior, inputs = problem()
    groups, (x, result, mu, b) = 5, inputs.values()
    together = posterior.sample(seed=3, first=2, count=groups)
    repeated = grouped_lora(
        x.repeat(groups, 1, 1), result.repeat(groups, 1, 1), mu, b, together.layers[LAYER], SCALING
    ).view(groups, *result.shape)
    for number in range(groups):
        layer = posterior.sample(seed=3, first=2 + number).layers[LAYER]
        a = mu + layer.matrix[0]
        torch.testing.assert_close(repeated[number], result + SCALING * x @ a.t() @ b.t())
    assert (repeated[0] - repeated[1]).abs().max() > 1e-3
