"""A method that only tests know, in the thirty lines that a new method takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import nn

from monteclora.methods import register
from monteclora.methods.base import Method, MethodOptions


@dataclass(frozen=True)
class HeadOptions(MethodOptions):
    """No options."""

    name: Literal["head_only"] = "head_only"


class HeadOnly(Method):
    """Trains the biases, the norms and the classification head."""

    name, description, options = "head_only", "trains biases, norms and head", HeadOptions

    def wrap(self, model: Any, options: Any, task_kind: str, seed: int) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in ("bias", "classifier", "norm")))
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(weights, folder / "head.safetensors")

    def load(self, model: nn.Module, folder: Path) -> None:
        model.load_state_dict(load_file(folder / "head.safetensors"), strict=False)


register(HeadOnly())
