"""What the check of row order depends on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import monteclora
from monteclora import MonteCLoRAConfig


@pytest.mark.parametrize("training", [True, False], ids=["per example", "two draws"])
def test_an_adapter_that_makes_rows_alike_changes_nothing(training: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    config = MonteCLoRAConfig(r=6, lora_alpha=6, target_modules=["0", "1"], noise="per_example", sample_scale=0.1)
    model = monteclora.get_peft_model(base, config)
    first = model.base_model.model[0]
    with torch.no_grad():  # the adapter takes the frozen layer away: the second layer's input is the first one's bias
        first.lora_A["default"].weight.copy_(torch.eye(6))
        first.lora_B["default"].weight.copy_(-first.base_layer.weight)
    x = torch.randn(4, 6)
    model.eval()
    assert torch.allclose(model(x)[:1].expand(4, -1), model(x), atol=1e-5)  # all rows alike, at the mean
    if training:
        out = model.train()(x)
    else:
        with monteclora.posterior_sampling(model, num_samples=2, seed=0):
            out = model(x.repeat(2, 1))
    assert (out - out[0]).abs().amax(1)[1:].min() > 1e-4  # drawn, row by row
