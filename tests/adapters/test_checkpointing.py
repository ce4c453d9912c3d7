"""Activation checkpointing repeats a block under the draw of its forward pass, or says that it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monteclora import variational_loss
from tests.models import batch_for, bert, gpt2, gradients, llama, posterior_of, relative_difference, t5, wrapped

# in double precision: in single, T5 differs by 1e-6, for the encoder's gradients are added up in another order
TOLERANCE = 1e-12

pytestmark = [
    # newer transformers have another name for it; the one that others call is tested
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    # of a forward pass without gradient through reentrant checkpointing
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [
        m for m in model.modules() if type(m).__name__ in ("LlamaDecoderLayer", "BertLayer", "GPT2Block", "T5Block")
    ]


@contextmanager
def plainly_checkpointed(model: nn.Module, *, reentrant: bool) -> Iterator[None]:
    """torch.utils.checkpoint around every block, as code that knows nothing of this package does it."""
    blocks = blocks_of(model)
    assert blocks
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward, reentrant)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _checkpointed(forward: Callable[..., Any], reentrant: bool, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=reentrant)


@contextmanager
def checkpointing(model: nn.Module, mode: str) -> Iterator[None]:
    """``off``, ``enable-...`` through the model, or ``plain-...`` around its blocks; reentrant or not."""
    if mode == "off":
        yield
        return
    way, kind = mode.split("-")
    reentrant = kind == "reentrant"
    if reentrant:
        model.enable_input_require_grads()
    if way == "plain":
        with plainly_checkpointed(model, reentrant=reentrant):
            yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    yield
    model.gradient_checkpointing_disable()


MODES = ["enable-reentrant", "enable-once", "plain-reentrant", "plain-once"]


def gradients_of(build: Callable[..., nn.Module], mode: str, forwards: int, **options: Any) -> dict[str, Tensor]:
    """The gradient of the objective after a number of training forwards, with the draw counter at 3."""
    model = wrapped(build, lora_dropout=0.1, **options).double()
    posterior_of(model).draws = 3
    torch.manual_seed(7)  # dropout
    # a repeated block would add to a cache a second time
    without_cache = {} if build is bert else {"use_cache": False}
    with checkpointing(model, mode):
        batches = [{**batch_for(build, seed=10 + number), **without_cache} for number in range(forwards)]
        loss = sum((number + 1) * model(**batch).loss for number, batch in enumerate(batches))
        (loss + variational_loss(model)).backward()
    assert posterior_of(model).draws == 3 + forwards
    return gradients(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [bert, llama, gpt2, t5])
def test_gradients_are_those_without_checkpointing(build: Callable[..., nn.Module], mode: str) -> None:
    if build is t5 and mode == "plain-reentrant":
        pytest.skip("its blocks take the encoder's states as a keyword, which that checkpointing does not support")
    assert relative_difference(gradients_of(build, "off", 1), gradients_of(build, mode, 1)) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"noise": "per_example"},
        {"covariance": "full"},
        {"dirichlet": "laplace", "regulariser": "sampled"},
        {"num_components": 1, "r": 1},
    ],
    ids=str,
)
def test_every_kind_of_noise_survives(mode: str, options: dict[str, Any]) -> None:
    plain, repeated = gradients_of(llama, "off", 1, **options), gradients_of(llama, mode, 1, **options)
    assert relative_difference(plain, repeated) < TOLERANCE


@pytest.mark.parametrize("mode", ["enable-reentrant", "enable-once"])
@pytest.mark.parametrize("build", [bert, llama, gpt2])
def test_two_forwards_before_one_backward(build: Callable[..., nn.Module], mode: str) -> None:
    assert relative_difference(gradients_of(build, "off", 2), gradients_of(build, mode, 2)) < TOLERANCE


def test_the_comparison_would_notice_a_wrong_draw() -> None:
    shifted = wrapped(llama, lora_dropout=0.1)
    posterior_of(shifted).draws = 4
    torch.manual_seed(7)
    (shifted(**batch_for(llama, seed=10)).loss + variational_loss(shifted)).backward()
    assert relative_difference(gradients_of(llama, "off", 1), gradients(shifted)) > 1e-2


def test_plain_checkpointing_over_two_forwards_raises_instead_of_a_wrong_gradient() -> None:
    with pytest.raises(RuntimeError, match=r"recomputed a layer under noise draw 4.* draw 3"):
        gradients_of(llama, "plain-once", 2)


@pytest.mark.parametrize("mode", ["plain-once", "enable-once"])
def test_with_rho_and_eta_frozen_plain_checkpointing_is_refused_since_nothing_would_notice_a_wrong_draw(
    mode: str,
) -> None:
    model = wrapped(llama, noise="per_example")
    posterior_of(model).requires_grad_(False)
    with checkpointing(model, mode):
        loss = model(**batch_for(llama)).loss
        if mode == "enable-once":
            loss.backward()
            return
        with pytest.raises(RuntimeError, match=r"rho and eta are frozen.*gradient_checkpointing_enable"):
            loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_with_rho_and_eta_frozen_a_shared_draw_is_still_told_apart(mode: str) -> None:
    def step(mode: str, forwards: int) -> dict[str, Tensor]:
        model = wrapped(llama, base={"use_cache": False})
        posterior_of(model).requires_grad_(False)
        with checkpointing(model, mode):
            sum(model(**batch_for(llama, seed=number)).loss for number in range(forwards)).backward()
        return gradients(model)

    found = step(mode, 1)
    assert not [name for name in found if "posterior" in name]
    assert relative_difference(step("off", 1), found) < TOLERANCE
    if mode.startswith("enable"):
        assert relative_difference(step("off", 2), step(mode, 2)) < TOLERANCE
    if mode == "plain-once":
        with pytest.raises(RuntimeError, match="run the backward pass before the next training forward"):
            step(mode, 2)


def test_a_forward_without_gradient_between_forward_and_backward() -> None:
    """TRL measures token accuracy so."""

    def step(mode: str) -> dict[str, Tensor]:
        model = wrapped(llama)
        with checkpointing(model, mode):
            loss = model(**batch_for(llama)).loss
            with torch.no_grad():
                model(**batch_for(llama, seed=5))
            loss.backward()
        return gradients(model)

    plain = step("off")
    for mode in ("enable-reentrant", "enable-once"):
        assert relative_difference(plain, step(mode)) < TOLERANCE


def test_accumulated_gradients_over_several_backwards() -> None:
    def steps(mode: str) -> dict[str, Tensor]:
        model = wrapped(llama, base={"use_cache": False})
        with checkpointing(model, mode):
            for number in range(3):
                model(**batch_for(llama, seed=number)).loss.backward()
        return gradients(model)

    plain = steps("off")
    for mode in MODES:
        assert relative_difference(plain, steps(mode)) < TOLERANCE


def test_switching_checkpointing_on_in_the_middle_of_training_binds_the_draw_again() -> None:
    def steps(mode: str) -> dict[str, Tensor]:
        model = wrapped(llama)
        model(**batch_for(llama)).loss.backward()
        for _ in range(2):  # the second time replaces the function that the first forward pass bound
            with checkpointing(model, mode):
                loss = model(**batch_for(llama, seed=3)).loss + model(**batch_for(llama, seed=4)).loss
                loss.backward()
        return gradients(model)

    assert relative_difference(steps("off"), steps("enable-once")) < TOLERANCE


@pytest.mark.parametrize("mode", ["enable-reentrant", "enable-once"])
def test_unloading_gives_the_blocks_their_own_checkpointing_back(mode: str) -> None:
    model = wrapped(llama)
    model.gradient_checkpointing_enable({"use_reentrant": mode == "enable-reentrant"})
    model(**batch_for(llama)).loss.backward()
    base = model.unload()
    for block in blocks_of(base):
        assert type(block._gradient_checkpointing_func).__module__ == "functools"
    base.train()(**batch_for(llama))


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_only_rho_and_eta_trainable(mode: str) -> None:
    from monteclora.adapters.active import train_posterior_only

    def step(mode: str) -> dict[str, Tensor]:
        model = wrapped(llama, base={"use_cache": False})
        train_posterior_only(model)
        with checkpointing(model, mode):
            model(**batch_for(llama)).loss.backward()
        return gradients(model)

    found = step(mode)
    assert sorted(found) == ["posteriors.default.eta", "posteriors.default.rho"]
    assert relative_difference(step("off"), found) < TOLERANCE
