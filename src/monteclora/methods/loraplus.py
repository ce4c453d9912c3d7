"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): LoRA whose B learns faster than its A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from monteclora.methods.base import Plan
from monteclora.methods.lora import LoRAFields, LoRAMethod

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LoRAPlus", "LoRAPlusOptions"]


@dataclass(frozen=True)
class LoRAPlusOptions(LoRAFields):
    """LoRA's options, and by how much B is faster.

    Args:
        learning_rate_ratio: B, and every trained vector (biases), learn at this multiple of
            ``training.learning_rate``.
    """

    name: Literal["loraplus"] = "loraplus"
    learning_rate_ratio: float = 16.0

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        found = super().problems()
        if self.learning_rate_ratio < 1:
            found.append(("learning_rate_ratio", f"is {self.learning_rate_ratio}, expected at least 1"))
        return found


class LoRAPlus(LoRAMethod):
    """See :class:`~monteclora.methods.base.Method`."""

    name = "loraplus"
    description = "LoRA whose B learns at a multiple of the learning rate"
    options = LoRAPlusOptions

    def parameter_groups(self, model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
        """The fast and the slow ones of ``peft.optimizers.create_loraplus_optimizer``, with the decay of other methods.

        There, adapted embeddings learn at a fixed rate of 1e-6; here they are slow ones, at the plan's rate.
        """
        fast = {id(p) for name, p in model.named_parameters() if "lora_B" in name or p.ndim == 1}
        groups = super().parameter_groups(model, plan)
        rates = plan.learning_rate, plan.learning_rate * plan.options.learning_rate_ratio
        return [
            {**group, "params": [p for p in group["params"] if (id(p) in fast) == is_fast], "lr": rates[is_fast]}
            for is_fast in (False, True)
            for group in groups
        ]
