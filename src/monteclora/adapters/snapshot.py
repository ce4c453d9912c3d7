"""Put a model back as it was when wrapping it fails half-way: peft replaces layers one by one and freezes the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora.layer import LoraLayer
from torch import nn

__all__ = ["unchanged_on_error"]


@contextmanager
def unchanged_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """If the block raises, ``model`` has the modules, trainable parameters and adapters that it had before.

    Args:
        model: what the block adapts, in place.
        adapter_name: the adapter it adds.
    """
    modules = dict(model.named_modules())
    parameters = [(module, dict(module.named_parameters(recurse=False))) for module in modules.values()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = model.__dict__.get("peft_config")
    try:
        yield
    except BaseException:
        for name, module in modules.items():  # parents come before their children
            if name and model.get_submodule(name) is not module:
                parent, _, leaf = name.rpartition(".")
                model.get_submodule(parent).register_module(leaf, module)
        for module, own in parameters:
            for name, parameter in own.items():
                module.register_parameter(name, parameter)  # peft replaces those of MultiheadAttention
        for module in modules.values():
            if isinstance(module, LoraLayer) and adapter_name in module.r:
                module.delete_adapter(adapter_name)
        for parameter, required in trainable:
            parameter.requires_grad_(required)
        if config is None:
            model.__dict__.pop("peft_config", None)
        raise
