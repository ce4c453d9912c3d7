"""Private names of peft, each with what it stands in for; a test fails when one changes.

The tests are in tests/adapters/test_private_names.py.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

__all__ = ["cast_input", "monteclora_loss"]


def cast_input(layer: LoraLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer's input in the dtype of its weights, unless ``peft.helpers.disable_input_dtype_casting`` is in force.

    peft has no public name for what its own layers ask here.
    """
    return cast(Tensor, layer._cast_input_dtype(x, dtype))


def monteclora_loss(model: Any) -> Any:
    """The regulariser of peft's own MonteCLoRA adapters, a scalar.

    It is the name that peft's documentation tells training loops to call; there is no public one.

    Args:
        model: the ``peft.LoraModel`` inside a ``PeftModel``.
    """
    return model._get_monteclora_loss()
