"""The layers that get an adapter: their names, whether they can be drawn, their shapes, and how wide they begin."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from monteclora.adapters.config import MonteCLoRAConfig
from monteclora.adapters.layers import supported_types
from monteclora.adapters.names import plain_name
from monteclora.adapters.offloading import check_base
from monteclora.errors import ConfigError
from monteclora.posterior import LayerShape

__all__ = ["check_target_names", "initial_scales", "layers_of", "shapes_of"]


def check_target_names(config: MonteCLoRAConfig, model: nn.Module) -> None:
    """Check that a module of ``model`` has each name in ``config.target_modules``.

    peft accepts the list when one of them is found.

    Raises:
        ConfigError: names that no module has, each with the nearest that exist.
    """
    if config.target_modules is None or isinstance(config.target_modules, str):
        return
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLayer))
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    leaves = sorted({name.rpartition(".")[2] for name in names})
    missing = [t for t in config.target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
    if missing:
        near = {name: ", ".join(difflib.get_close_matches(name, leaves, 3, 0.4)) for name in sorted(missing)}
        listed = "; ".join(f"'{name}'" + (f" (nearest: {found})" if found else "") for name, found in near.items())
        raise ConfigError(
            f"target_modules names no module of {type(model).__name__}: {listed}",
            "Name layers as they appear in model.named_modules(), or use 'all-linear'.",
        )


def layers_of(model: nn.Module, adapter_name: str) -> list[tuple[str, LoraLayer]]:
    """The layers of an adapter, by name.

    Raises:
        ConfigError: one of them is of a type that cannot be drawn, named with its type.
    """
    supported = supported_types()
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.r]
    for name, layer in layers:
        if type(layer) not in supported:
            base = type(layer.get_base_layer()).__name__
            # layers that users register with peft, and peft's for Linear with a quantised weight
            by = f" that peft adapts with {type(layer).__qualname__}" if base in ("Linear", "Conv1D") else ""
            raise ConfigError(
                f"target module '{name}' is a {base}{by}, and MonteCLoRA adapts Linear, Conv1D and bitsandbytes "
                "4-bit and 8-bit layers only, with peft's own layers for them",
                "Take it out of target_modules, or list it in exclude_modules.",
            )
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise ConfigError(
                f"target module '{name}' is never called: nn.MultiheadAttention uses its weight alone",
                "Take it out of target_modules, or list it in exclude_modules.",
            )
        check_base(name, layer.get_base_layer())
    return layers


def shapes_of(layers: Sequence[tuple[str, LoraLayer]], adapter_name: str) -> list[LayerShape]:
    """Name, rank and inputs of an adapter's layers."""
    return [LayerShape(plain_name(name), layer.r[adapter_name], layer.in_features) for name, layer in layers]


def initial_scales(config: MonteCLoRAConfig, adapter_name: str, layers: Sequence[LoraLayer]) -> list[float]:
    """eps of each layer: absolute, or relative to the root mean square of its initial A (docs/method.md section 1)."""
    relative, value = config.scale()
    if not relative:
        return [value] * len(layers)
    weights = [cast(Tensor, layer.lora_A[adapter_name].weight) for layer in layers]
    if any(weight.is_meta for weight in weights):
        # no values to measure yet: those of the default initialisation, uniform with variance 1 / (3 n)
        return [value / math.sqrt(3.0 * weight.shape[1]) for weight in weights]
    device = weights[0].device
    squares = torch.stack([_whole(weight.detach().float().square().mean()).to(device) for weight in weights])
    return [value * root for root in squares.sqrt().tolist()]


def _whole(value: Tensor) -> Tensor:
    """A scalar that FSDP2 may have computed from the shards of all processes."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole
