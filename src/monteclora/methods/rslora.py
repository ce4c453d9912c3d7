"""Rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732): LoRA whose scale falls with the root of the rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from monteclora.methods.lora import LoRAFields, LoRAMethod

__all__ = ["RsLoRA", "RsLoRAOptions"]


@dataclass(frozen=True)
class RsLoRAOptions(LoRAFields):
    """LoRA's options; the scale is ``lora_alpha / sqrt(r)``."""

    name: Literal["rslora"] = "rslora"
    use_rslora: bool = True

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        found = super().problems()
        if not self.use_rslora:
            found.append(("use_rslora", "is false, which is the method lora"))
        return found


class RsLoRA(LoRAMethod):
    """See :class:`~monteclora.methods.base.Method`."""

    name = "rslora"
    description = "rank-stabilised LoRA: the update is scaled by lora_alpha / sqrt(r)"
    options = RsLoRAOptions
