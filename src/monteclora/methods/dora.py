"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA for the direction of each weight column, and its trained length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from monteclora.methods.lora import LoRAFields, LoRAMethod

__all__ = ["DoRA", "DoRAOptions"]


@dataclass(frozen=True)
class DoRAOptions(LoRAFields):
    """LoRA's options."""

    name: Literal["dora"] = "dora"


class DoRA(LoRAMethod):
    """See :class:`~monteclora.methods.base.Method`."""

    name = "dora"
    description = "weight-decomposed LoRA: direction by a low-rank update, magnitude trained by itself"
    options = DoRAOptions

    def arguments(self, options: DoRAOptions) -> dict[str, Any]:
        """As in the base class."""
        return {"use_dora": True}
