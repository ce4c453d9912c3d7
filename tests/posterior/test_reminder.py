"""One warning where rho and eta are trained without the regulariser, and none where it is there or not needed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from monteclora import MonteCLoRAConfig, get_peft_model, variational_loss
from monteclora.adapters.active import active_posteriors
from tests.models import batch_for, config_for, llama, wrapped

WARNING = "3 optimiser steps were taken on a MonteCLoRA adapter without its regulariser"


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without its regulariser")
        yield


def loop(
    model: nn.Module,
    steps: int = 8,
    accumulated: int = 1,
    add: Callable[[int, int], bool] = lambda step, batch: False,
    **options: Any,
) -> None:
    """A loop of one's own that adds the regulariser to the batches for which ``add(step, batch)`` holds."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, **options)
    for step in range(steps):
        for batch in range(accumulated):
            loss = model(**batch_for(llama)).loss
            (loss + variational_loss(model) if add(step, batch) else loss).backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("accumulated", [1, 5])
def test_a_loop_without_the_regulariser_warns_once(accumulated: int) -> None:
    model = wrapped(llama)
    with silence():
        loop(model, 3, accumulated)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        loop(model, 8, accumulated)
    assert len([w for w in caught if "regulariser" in str(w.message)]) == 1
    with silence():
        loop(model, 8, accumulated)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_whatever_the_optimisers_implementation(options: dict[str, bool]) -> None:
    """Those of the fused one do not count as changes in place."""
    with pytest.warns(UserWarning, match=WARNING):
        loop(wrapped(llama), 4, **options)


def test_also_under_activation_checkpointing_and_in_a_copy() -> None:
    model = wrapped(llama)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        with pytest.warns(UserWarning, match=WARNING):
            loop(each, 4)


@pytest.mark.parametrize(
    ("accumulated", "add"),
    [
        (1, lambda step, batch: True),
        (40, lambda step, batch: batch == 39),
        (1, lambda step, batch: step % 3 == 0),
    ],
    ids=["every step", "last of many accumulated batches", "every third step"],
)
def test_no_warning_where_the_regulariser_is_added(accumulated: int, add: Callable[[int, int], bool]) -> None:
    with silence():
        loop(wrapped(llama), 5, accumulated, add)


def test_looking_at_the_regulariser_without_a_gradient_is_not_adding_it() -> None:
    model = wrapped(llama)

    def log(step: int, batch: int) -> bool:
        with torch.no_grad():
            variational_loss(model)
        return False

    with pytest.warns(UserWarning, match=WARNING):
        loop(model, 5, 1, log)


def frozen_posterior() -> Any:
    model = wrapped(llama)
    for posterior in active_posteriors(model):
        posterior.requires_grad_(False)
    return model


def reference_adapter() -> Any:
    """A frozen MonteCLoRA adapter below the plain head that is trained."""
    model = wrapped(llama)
    model.requires_grad_(False)
    model.get_base_model().lm_head.requires_grad_(True)
    return model


def switched_off() -> Any:
    model = wrapped(llama)
    for posterior in active_posteriors(model):
        posterior.enabled = False
    return model


def without_weights() -> Any:
    return get_peft_model(llama(), MonteCLoRAConfig(r=4, target_modules=["q_proj"], kl_weight=0.0, coop_weight=0.0))


@pytest.mark.parametrize("build", [frozen_posterior, reference_adapter, switched_off, without_weights])
def test_no_warning_where_nothing_is_to_be_regularised(build: Callable[[], Any]) -> None:
    with silence():
        loop(build().train())


def test_no_warning_without_an_optimiser() -> None:
    """Many gradients at the same rho, as a study of their variance takes them."""
    model = wrapped(llama)
    with silence():
        for _ in range(10):
            model(**batch_for(llama)).loss.backward()


def test_loading_values_into_rho_is_no_optimiser_step() -> None:
    model = get_peft_model(llama(), config_for(llama))
    with silence():
        for _ in range(10):
            model(**batch_for(llama))
            with torch.no_grad():
                active_posteriors(model)[0].rho.zero_()
