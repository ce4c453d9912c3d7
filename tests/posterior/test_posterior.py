"""The posterior as a module and as a source of draws: what a draw depends on, and what survives copies and casts."""

from __future__ import annotations

import copy
import pickle
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from monteclora.errors import ConfigError
from monteclora.posterior import AdapterPosterior, Draw, LayerShape, PosteriorSettings, in_force, noise
from tests.posterior.building import random_posterior

VARIANTS: list[dict[str, Any]] = [
    {"covariance": covariance, "dirichlet": law, "noise": kind}
    for covariance in ("diagonal", "full")
    for law in ("exact", "laplace")
    for kind in ("shared", "per_example")
]
CONSTANTS = ("_nu", "_c", "_log_determinant", "_ranks", "_layer_of_row")


def tensors(draw: Draw) -> list[Tensor]:
    parts = [tensor.detach() for layer in draw.layers for tensor in layer if isinstance(tensor, Tensor)]
    return [*parts, draw.row_scale, draw.squared_norm, draw.row_squared_norm, draw.row_log_determinant]


def same(one: Draw, two: Draw) -> bool:
    return one.index == two.index and all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


def at(posterior: AdapterPosterior, index: int, rank: int = 0) -> Draw:
    posterior.draws = index
    return posterior.draw(rank, batch_size=3)


# -- what a draw depends on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_a_draw_is_a_function_of_seed_rank_and_number(variant):
    posterior = random_posterior(5, **variant)
    expected = {(index, rank): at(posterior, index, rank) for index in range(4) for rank in (0, 1)}
    torch.manual_seed(3)
    torch.rand(5)
    np.random.seed(3)
    random.seed(3)
    posterior.sample(5, 0, 3)
    again = random_posterior(5, **variant)
    for index, rank in [(3, 1), (0, 0), (2, 1), (2, 0), (2, 0), (1, 1), (3, 0), (0, 1), (1, 0)]:
        assert same(at(again, index, rank), expected[index, rank])
    assert not same(at(random_posterior(6, **variant), 0), expected[0, 0])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_global_generators_are_untouched(variant):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    posterior = AdapterPosterior([LayerShape("a", 3, 4)], [0.1], PosteriorSettings(**variant))
    posterior.draw(batch_size=2)
    posterior.sample(0, 0, 2)
    posterior.regulariser()
    posterior.moments()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_neither_autocast_nor_threads_nor_grad_mode_change_a_draw(covariance):
    posterior = random_posterior(covariance=covariance, shapes=((8, 64), (4, 33)))
    expected = at(posterior, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(at(posterior, 0), expected)
    with torch.no_grad():
        assert same(at(posterior, 0), expected)
    with torch.inference_mode():
        assert same(at(posterior, 0), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert same(at(posterior, 0), expected)
    finally:
        torch.set_num_threads(threads)


def noise_of(draw: Draw) -> Tensor:
    return torch.cat([part.matrix.detach().flatten() for part in draw.layers])


def test_ranks_seeds_draws_layers_and_uses_are_uncorrelated():
    wide = ((4, 1500), (4, 1500))
    streams = []
    for seed in (0, 1):
        posterior = random_posterior(seed, shapes=wide)
        for draw in [at(posterior, i, rank) for i in (0, 1, 2) for rank in (0, 1)]:
            streams += [part.matrix.detach().flatten() for part in draw.layers]
        # the same seed as training's: the stream is still another one
        streams += [part.matrix.flatten() for i in (0, 1, 2) for part in posterior.sample(seed, i).layers]
    stacked = torch.stack(streams)
    correlation = torch.corrcoef(stacked) - torch.eye(len(streams))
    assert correlation.abs().max() < 5.0 / stacked.shape[1] ** 0.5


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_every_kind_of_noise_has_a_generator_of_its_own(covariance, monkeypatch):
    asked = []

    def recording(seed: int, rank: int, draw: int, kind: noise.Kind, *rest: Any, **use: Any) -> torch.Generator:
        asked.append((seed, rank, draw, kind, use.get("posterior_sample", False)))
        return original(seed, rank, draw, kind, *rest, **use)

    original = noise.generator
    monkeypatch.setattr(noise, "generator", recording)
    posterior = random_posterior(8, covariance=covariance, noise="per_example")
    at(posterior, 7, rank=3)
    assert sorted(asked) == [(8, 3, 7, kind, False) for kind in noise.Kind]
    asked.clear()
    posterior.sample(5, 2)
    assert sorted(asked) == [(5, 0, 2, kind, True) for kind in noise.Kind if kind != noise.Kind.SIGN]


def test_prediction_never_draws_what_training_drew():
    posterior = random_posterior(seed=4)
    training = {noise_of(at(posterior, i)).numpy().tobytes() for i in range(300)}
    prediction = {noise_of(posterior.sample(4, i)).numpy().tobytes() for i in range(300)}
    assert len(training) == len(prediction) == 300
    assert not training & prediction


# -- the counter ---------------------------------------------------------------------------------------------------


def test_every_training_draw_advances_the_counter_and_becomes_the_current_one():
    posterior = random_posterior()
    assert posterior.draws == 0
    assert posterior.current is None
    for index in range(3):
        draw = posterior.draw()
        assert posterior.current is draw
        assert draw.index == index
        assert draw.groups == 0
        assert posterior.draws == index + 1


def test_the_last_draw_is_let_go_before_the_next_is_made(monkeypatch):
    """Two at once would take twice the memory."""
    posterior, original, alive = random_posterior(), noise.generator, []
    last = weakref.ref(posterior.draw())

    def recording(*args: Any, **use: Any) -> torch.Generator:
        alive.append(last() is not None)
        return original(*args, **use)

    monkeypatch.setattr(noise, "generator", recording)
    posterior.draw()
    assert alive
    assert not any(alive)


def test_slots_hold_their_layers_part_of_whatever_is_current():
    posterior = random_posterior()
    assert len(posterior.slots) == len(posterior.layers)
    draw, prediction = posterior.draw(), posterior.sample(0, 0, 2)
    with in_force.restored():
        posterior.predict_with(prediction)
        assert posterior.predictive is prediction
        for slot, trained, sampled in zip(posterior.slots, draw.layers, prediction.layers, strict=True):
            assert slot.current is trained
            assert slot.predictive is sampled
        posterior.predict_with(None)
        assert posterior.predictive is None
    posterior.current = None
    assert all(slot.current is slot.predictive is None for slot in posterior.slots)


def test_prediction_and_the_regulariser_leave_the_counter_and_the_current_draw():
    posterior = random_posterior(regulariser="sampled")
    current = posterior.draw()
    posterior.sample(0, 0, 4)
    posterior.regulariser()
    posterior.moments()
    assert posterior.draws == 1
    assert posterior.current is current
    assert posterior.predictive is None


def test_a_resumed_posterior_draws_on_where_it_stopped():
    whole, resumed = random_posterior(2), random_posterior(2)
    draws = [whole.draw() for _ in range(6)]
    resumed.draws = 3
    assert all(same(resumed.draw(), draw) for draw in draws[3:])


def test_per_example_noise_needs_the_batch_size_and_a_refused_draw_is_not_counted():
    posterior = random_posterior(noise="per_example")
    with pytest.raises(ConfigError, match="number of examples") as error:
        posterior.draw()
    assert error.value.hint
    assert posterior.draws == 0
    assert posterior.current is None


def test_the_batch_size_does_not_change_the_noise():
    posterior = random_posterior(noise="per_example")
    draws = [random_posterior(noise="per_example").draw(batch_size=size) for size in (1, 8)]
    shared = posterior.draw(batch_size=2)
    for draw in draws:
        assert torch.equal(noise_of(draw), noise_of(shared))
        assert torch.equal(draw.row_scale, shared.row_scale)


# -- prediction draws ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS[::2], ids=lambda v: "-".join(map(str, v.values())))
def test_draws_made_at_once_are_the_separate_ones(variant):
    posterior = random_posterior(**variant)
    together = posterior.sample(9, first=3, count=5)
    assert together.groups == 5
    assert together.index == 3
    for number in range(5):
        alone = posterior.sample(9, first=3 + number)
        assert alone.groups == 1
        assert torch.equal(alone.row_scale[0], together.row_scale[number])
        for one, many in zip(alone.layers, together.layers, strict=True):
            assert torch.equal(one.matrix[0], many.matrix[number])
            assert one.sign_in is many.sign_in is None
            assert not one.matrix.requires_grad


def test_prediction_draws_take_no_part_of_the_training_counter_and_seed():
    one, two = random_posterior(1), random_posterior(1)
    two.seed, two.draws = 77, 12
    assert same(one.sample(0, 2, 2), two.sample(0, 2, 2))


# -- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_parts_have_their_layers_shapes(variant):
    shapes = ((2, 5), (3, 4), (1, 7), (3, 5))
    posterior = random_posterior(shapes=shapes, **variant)
    for (rank, columns), part in zip(shapes, posterior.draw(batch_size=6).layers, strict=True):
        assert part.matrix.shape == (rank, columns)
        if variant["noise"] == "per_example":
            assert part.sign_in.shape == (6, columns)
            assert part.sign_out.shape == (6, rank)
    for (rank, columns), part in zip(shapes, posterior.sample(0, 0, 2).layers, strict=True):
        assert part.matrix.shape == (2, rank, columns)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_layers_parameters_and_scale_move_its_own_draws_only(covariance):
    """And by the documented factors: eps, exp(rho) of the row, and ||pi||."""
    posterior = random_posterior(covariance=covariance)
    before = at(posterior, 0)
    with torch.no_grad():
        posterior.rho[3] += 1.0
        posterior.scale[2] *= 3.0
    after = at(posterior, 0)
    factors = [torch.ones(2, 1), torch.tensor([[1.0], [1.0], [1.0]]), torch.full((1, 1), 3.0)]
    factors[1][1] = torch.e
    for one, two, factor in zip(before.layers, after.layers, factors, strict=True):
        torch.testing.assert_close(two.matrix, factor * one.matrix)
    with torch.no_grad():
        posterior.eta[0] += 5.0
    last = at(posterior, 0)
    ratio = (last.squared_norm / after.squared_norm).sqrt()
    assert ratio[0] < 0.99
    torch.testing.assert_close(last.layers[0].matrix, ratio[0] * after.layers[0].matrix)
    assert all(torch.equal(one.matrix, two.matrix) for one, two in zip(after.layers[1:], last.layers[1:], strict=True))


def test_more_degrees_of_freedom_than_the_rank():
    posterior = random_posterior(degrees_of_freedom=1e8)
    # the covariance then hardly varies: eps ||pi|| exp(rho) is left
    draw = posterior.draw()
    expected = (posterior.scale * draw.squared_norm.sqrt())[posterior._layer_of_row] * posterior.rho.exp()
    torch.testing.assert_close(draw.row_scale, expected, rtol=1e-3, atol=0.0)


def test_fewer_degrees_of_freedom_than_a_rank_are_refused_by_name():
    layers = [LayerShape("small", 2, 4), LayerShape("encoder.large", 8, 4)]
    with pytest.raises(ConfigError, match=r"encoder\.large.*rank 8") as error:
        AdapterPosterior(layers, [0.1, 0.1], PosteriorSettings(degrees_of_freedom=4))
    assert error.value.hint


def test_a_new_posterior_is_at_the_prior():
    posterior = AdapterPosterior([LayerShape("a", 2, 3)], [0.1], PosteriorSettings(num_components=5, alpha_prior=2.0))
    assert torch.equal(posterior.rho, torch.zeros(2))
    torch.testing.assert_close(posterior.eta.exp(), torch.full((1, 5), 2.0))
    assert sorted(posterior.state_dict()) == ["_extra_state", "eta", "rho", "scale"]
    assert "layers=1" in repr(posterior)


# -- copies, casts and devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["deepcopy", "pickle"])
def test_a_copy_keeps_parameters_and_counter_and_is_its_own(copied):
    posterior = random_posterior(3, regulariser="sampled")
    # copied between a forward and a backward pass, as averaging callbacks do
    loss = sum(part.matrix.sum() for part in posterior.draw().layers) + posterior.regulariser().loss
    other = copied(posterior)
    loss.backward()
    assert torch.equal(other.rho, posterior.rho)
    assert torch.equal(other.eta, posterior.eta)
    assert (other.seed, other.draws, other.layers) == (posterior.seed, posterior.draws, posterior.layers)
    assert other.settings == posterior.settings
    assert other.current is other.predictive is None
    assert all(slot.current is slot.predictive is None for slot in other.slots)
    assert other.rho.grad is None
    held = [slot.current for slot in posterior.slots]
    theirs = other.draw()
    assert all(slot.current is part for slot, part in zip(posterior.slots, held, strict=True))
    assert other.draws == posterior.draws + 1
    assert same(theirs, posterior.draw())
    with torch.no_grad():
        other.rho.add_(1.0)
    assert not torch.equal(other.rho, posterior.rho)


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.half)]
)
def test_low_precision_stops_at_the_posterior(cast):
    model = torch.nn.ModuleDict({"base": torch.nn.Linear(2, 2), "posterior": random_posterior()})
    before = copy.deepcopy(model["posterior"])
    cast(model)
    assert model["base"].weight.dtype in (torch.half, torch.bfloat16)
    for name, tensor in [*model["posterior"].named_parameters(), *model["posterior"].named_buffers()]:
        assert tensor.dtype in (torch.float32, torch.int64), name
    assert torch.equal(model["posterior"].rho, before.rho)
    assert same(model["posterior"].draw(), before.draw())


def test_double_is_double_throughout():
    posterior = random_posterior(covariance="full", degrees_of_freedom=7.3).double()
    draw = posterior.draw()
    assert {tensor.dtype for tensor in tensors(draw)} == {torch.float64}
    assert posterior.regulariser().loss.dtype == torch.float64
    # constants are computed again, not the rounded ones of float32
    assert posterior._nu[0].item() == 7.3
    assert {posterior.bfloat16().rho.dtype, posterior.float().rho.dtype} == {torch.float64, torch.float32}


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_does_not_matter(default):
    expected = random_posterior()
    torch.set_default_dtype(default)
    try:
        posterior = AdapterPosterior(expected.layers, expected.scale.tolist(), PosteriorSettings())
        posterior.load_state_dict(expected.state_dict())
        draw = posterior.draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert posterior.rho.dtype == torch.float32
    assert same(draw, expected.draw())


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_posterior_without_values_gets_them_from_a_state_dict(covariance):
    expected = random_posterior(covariance=covariance, degrees_of_freedom=5.0)
    settings = expected.settings
    built = AdapterPosterior(expected.layers, expected.scale.tolist(), settings, device="meta")
    with torch.device("meta"):
        context = AdapterPosterior(expected.layers, expected.scale.tolist(), settings)
    for posterior in (built, context, copy.deepcopy(expected).to("meta")):
        assert {tensor.device.type for tensor in [posterior.rho, posterior.eta, *posterior.buffers()]} == {"meta"}
        posterior.to_empty(device="cpu").load_state_dict(expected.state_dict())
        for name in CONSTANTS:
            assert torch.equal(getattr(posterior, name), getattr(expected, name)), name
        posterior.seed = expected.seed
        assert same(at(posterior, 4), at(expected, 4))
        torch.testing.assert_close(posterior.regulariser().loss, expected.regulariser().loss)


def test_moving_forgets_draws_on_the_old_device():
    posterior = random_posterior()
    posterior.draw()
    posterior.mirror(posterior.sample(0, 0))
    posterior.to("cpu")
    assert posterior.current is None
    assert all(slot.current is slot.predictive is None for slot in posterior.slots)
    assert posterior.draws == 1
