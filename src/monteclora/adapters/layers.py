"""The LoRA variant: a LoRA layer whose A is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from torch import Tensor, nn

from monteclora.adapters.functional import drawn_lora, grouped_lora
from monteclora.adapters.peft_private import cast_input
from monteclora.adapters.row_checks import without_adapters
from monteclora.adapters.scope import DrawScope
from monteclora.posterior import AdapterPosterior
from monteclora.posterior.torch_private import in_backward, parts_of

__all__ = ["DrawnLayer", "DrawnLinear", "supported_types"]


def supported_types() -> tuple[type[nn.Module], ...]:
    """The layers of peft that can be drawn."""
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available

    types: list[type[nn.Module]] = [Linear, DrawnLinear]
    if is_bnb_available():
        from peft.tuners.lora.bnb import Linear8bitLt

        types.append(Linear8bitLt)
    if is_bnb_4bit_available():
        from peft.tuners.lora.bnb import Linear4bit

        types.append(Linear4bit)
    return tuple(types)


def _delta(module: LoraLayer, adapter_name: str, weight: Tensor) -> Tensor:
    """What the mean adds to a base weight; to a quantised one in full precision, as peft does: it is rounded later."""
    delta: Tensor = module.get_delta_weight(adapter_name)
    return delta.to(weight.dtype) if isinstance(module, Linear) else delta


class DrawnLayer(LoraVariant):
    """What one layer knows about its posterior: which one, and its place in it."""

    def __init__(self, posterior: AdapterPosterior, index: int, scope: DrawScope) -> None:
        self.posterior = posterior
        self.slot = posterior.slots[index]
        self.scope = scope

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: ``attach`` builds the posterior when all layers are there."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The base weight with the mean merged in, as a new tensor."""
        return orig_weight + _delta(module, active_adapter, orig_weight)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge the mean into the base weight in place."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight with the mean taken out again."""
        return orig_weight - _delta(module, active_adapter, orig_weight)

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Add the adapter to the frozen layer's output: drawn where there is a draw, else plain LoRA.

        Args:
            module: the LoRA layer.
            active_adapter: its adapter.
            x: the layer's input, shape (..., n).
            result: the frozen layer's output, shape (..., m).
            **kwargs: what other variants need.
        """
        parts = parts_of(module)
        lora_b, dropout = _part(parts, "lora_B", active_adapter), _part(parts, "lora_dropout", active_adapter)
        scaling, posterior = module.scaling[active_adapter], self.posterior
        if not isinstance(dropout, nn.Identity):
            x = dropout(x)
        if module.training:
            if posterior.enabled and not posterior.drawn:
                self.scope.draw_late(posterior)
            layer = self.slot.current
        elif torch.compiler.is_compiling():
            if posterior.enabled and posterior.awaits_draw:
                self.scope.refuse_alone()
            layer = self.slot.predictive
        else:
            draw = self.scope.predictive(posterior)
            layer = None if draw is None else draw.layers[self.slot.index]
        if layer is None or not posterior.enabled:
            if not torch.compiler.is_compiling() and without_adapters():
                return result
            lora_a = _part(parts, "lora_A", active_adapter)
            x = cast_input(module, x, lora_a.weight.dtype)
            return cast(Tensor, result + lora_b(lora_a(x)) * scaling)
        mu = None
        if not layer.has_mean:
            mu = _part(parts, "lora_A", active_adapter).weight
            if x.device != layer.transposed.device:
                layer = layer.to(x.device)
        if layer.transposed.dim() == 3:
            assert mu is not None
            output = grouped_lora(x, result, mu, lora_b.weight, layer, scaling)
        else:
            # a compiled graph repeats itself with the draw that is its input
            if not torch.compiler.is_compiling() and in_backward():
                posterior.note_repetition(layer)
            output = drawn_lora(x, result, mu, lora_b.weight, layer, scaling)
        return output + lora_b.bias * scaling if module.lora_bias[active_adapter] else output


def _part(modules: Mapping[str, Any], kind: str, adapter_name: str) -> Any:
    """An adapter's module of a kind, as ``lora_A``."""
    return parts_of(modules[kind])[adapter_name]


class DrawnLinear(Linear):
    """peft's layer, with a short way to the adapter that is active alone and drawn.

    Before every product peft asks what else might have been asked of a layer, which on small batches takes as long as
    the product.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in peft; inputs of shape (..., n), outputs of shape (..., m)."""
        active = self.active_adapter
        name = active if isinstance(active, str) else active[0] if len(active) == 1 else None
        if name is not None and not (args or kwargs or self.disable_adapters or self.merged_adapters):
            variant = self.lora_variant.get(name)
            if isinstance(variant, DrawnLayer):
                result: Tensor = parts_of(self)["base_layer"](x)
                output: Tensor = variant.forward(self, name, x, result)
                return output if output.dtype == result.dtype else output.to(result.dtype)
        return cast(Tensor, super().forward(x, *args, **kwargs))
