"""Where rho and eta stand in an optimiser of the user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

import monteclora
from monteclora.errors import ConfigError
from tests.models import batch_for, llama, posterior_of, wrapped


def rates(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(groups) == len(trained)
    return {name: (groups[id(p)]["lr"], groups[id(p)]["weight_decay"]) for name, p in trained}


@pytest.mark.parametrize("rate", [None, 5e-4])
def test_lora_plus_in_a_loop_of_ones_own(rate: float | None) -> None:
    model = wrapped(llama)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    assert rates(model, optimizer)["posteriors.default.rho"][0] == 16e-3  # what is to be mended
    monteclora.separate_posterior(model, optimizer, rate)
    found = rates(model, optimizer)
    for name, (lr, decay) in found.items():
        if "posteriors" in name:
            assert (lr, decay) == (rate or 1e-3, 0.0)
        else:
            assert lr == pytest.approx(16e-3 if "lora_B" in name else 1e-3)
    monteclora.separate_posterior(model, optimizer)
    assert rates(model, optimizer) == found
    # Adam's first step is the learning rate, whatever the gradient
    before = posterior_of(model).eta.detach().clone()
    (model(**batch_for(llama)).loss + monteclora.variational_loss(model)).backward()
    optimizer.step()
    step = (posterior_of(model).eta - before).abs().max().item()
    assert step == pytest.approx(rate or 1e-3, rel=1e-2)


def test_a_model_without_a_posterior() -> None:
    base = llama()
    with pytest.raises(ConfigError, match="has no MonteCLoRA adapter"):
        monteclora.separate_posterior(base, torch.optim.SGD(base.parameters(), 0.1))
