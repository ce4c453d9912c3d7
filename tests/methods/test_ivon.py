"""IVON's draw of the weights: over when its block is, however that ends."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monteclora.methods.base import Plan
from monteclora.methods.ivon import Ivon, IvonOptions

pytest.importorskip("ivon")


def optimised() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    plan = Plan(
        options=IvonOptions(effective_sample_size=10.0),
        phase="cooperative",
        steps=2,
        rows=4,
        learning_rate=0.1,
        weight_decay=0.0,
        seed=3,
    )
    return model, Ivon().optimizer([{"params": list(model.parameters()), "weight_decay": 0.0}], plan)


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_an_error_inside_the_block_leaves_the_mean() -> None:
    model, optimizer = optimised()
    before = values(model)
    with contextlib.suppress(ZeroDivisionError), Ivon().gradient_context(optimizer):
        assert not any(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
        raise ZeroDivisionError
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_a_weight_that_no_batch_reaches_has_a_gradient_of_zero() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    found = []
    for reached in (False, True):
        model, optimizer = optimised()
        before = values(model)
        with Ivon().gradient_context(optimizer):
            loss = model["used"](x).square().sum()
            (loss + 0.0 * model["idle"](x).sum() if reached else loss).backward()
        assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
        optimizer.step()
        found.append(values(model))
        assert not torch.equal(before[0], found[-1][0])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_step_without_gradients_forgets_what_a_step_forgets() -> None:
    """All of ivon's state but the groups', which this release keeps in these names."""
    model, optimizer = optimised()
    for skipped in (False, True):
        with Ivon().gradient_context(optimizer):
            model["used"](torch.ones(1, 3)).sum().backward()
        assert optimizer.state["count"] == 1
        if skipped:
            optimizer.zero_grad()
        before = values(model)
        optimizer.step()
        assert dict(optimizer.state) == {"count": 0, "avg_grad": None, "avg_nxg": None, "avg_gsq": None}
        assert torch.equal(before[0], values(model)[0]) is skipped
