"""What training needs of bitsandbytes' layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

__all__ = ["keep_differentiable"]


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers differentiable on the CPU, whatever is evaluated in between.

    In evaluation mode bitsandbytes repacks their weights for a kernel that passes no gradient back, and leaves them so:
    training would continue without the gradient of the layers below. From now on they are not repacked; those that are
    get their weights back, as exactly as bitsandbytes can (it rounds the scales). Other layers are left as they are.
    """
    for module in cast("Iterator[Any]", model.modules()):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                module.state_dict()  # bitsandbytes unpacks the weights when their state is taken
