"""Where rho and eta stand in an optimiser."""

from __future__ import annotations

import torch
from torch import nn

from monteclora.adapters.active import active_posteriors

__all__ = ["separate_posterior"]


def separate_posterior(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float | None = None) -> None:
    """Give rho and eta a parameter group of their own, without weight decay: the prior regularises them.

    Rules for the groups of LoRA's weights are not made for them: ``peft.optimizers.create_loraplus_optimizer`` would
    train rho at the multiplied rate of lora_B. Call it before a scheduler is made for the optimiser, and before the
    first step. Groups that hold parameters of the posterior alone are left as they are.

    Args:
        model: the wrapped model.
        optimizer: has some or all of the model's parameters; changed in place.
        lr: learning rate of the new group; by default the optimiser's own.

    Raises:
        ConfigError: the model has no MonteCLoRA adapter.
    """
    own = {id(p) for posterior in active_posteriors(model) for p in posterior.parameters()}
    moved: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        others = [p for p in group["params"] if id(p) not in own]
        if others:
            moved += [p for p in group["params"] if id(p) in own]
            group["params"] = others
    if moved:
        rate = optimizer.defaults["lr"] if lr is None else lr
        optimizer.add_param_group({"params": moved, "lr": rate, "weight_decay": 0.0})
