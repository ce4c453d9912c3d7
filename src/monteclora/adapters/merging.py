"""Merge an adapter's mean into the base weights, also where those are shared with another layer.

An output head often is the input embedding. Merging into one would change the other, so the two are separated in the
merged copy; in the model itself such a merge is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from monteclora.errors import ConfigError
from monteclora.posterior.torch_private import original

__all__ = ["merged_copy", "shared_targets", "uncompiled"]


def _uses(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Each use of a parameter: the module, its name there, and the parameter."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield module, name, parameter


def shared_targets(model: nn.Module) -> list[str]:
    """The names of adapted layers whose base weight another layer uses too."""
    counts: dict[int, int] = {}
    for _, _, parameter in _uses(model):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    return [name for name, layer in layers if counts.get(id(getattr(layer.get_base_layer(), "weight", None)), 0) > 1]


def merged_copy(model: PeftModel) -> nn.Module:
    """A copy of the base model with the active adapter's mean merged in; ``model`` is left as it is.

    If a target's weight is shared, every shared weight of the copy becomes a weight of its own, and its configuration
    says ``tie_word_embeddings=False``.

    Raises:
        ConfigError: a target's weight is shared, and the architecture has no other form.
    """
    shared = shared_targets(model)
    if shared:
        _check_separable(model.get_base_model(), shared[0])
    copied: Any = copy.deepcopy(model)
    if shared:
        _separate(copied.get_base_model())
    with torch.no_grad():
        merged: nn.Module = copied.merge_and_unload(safe_merge=True)
    return uncompiled(merged)


def uncompiled(model: nn.Module) -> nn.Module:
    """A model without the wrappers that ``torch.compile`` put around it or its parts, which are removed in place.

    Saved with them, it would have weights of other names, which nothing finds again.
    """
    model = original(model)
    for module in list(model.modules()):
        for name, part in module.named_children():
            if original(part) is not part:
                module.register_module(name, original(part))
    return model


def _check_separable(base: nn.Module, target: str) -> None:
    """Raise if a configuration of the model's kind that says ``tie_word_embeddings=False`` does not stay so."""
    config: Any = getattr(base, "config", None)
    if config is None or not hasattr(config, "tie_word_embeddings"):
        return
    apart = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
    if apart.tie_word_embeddings:
        raise ConfigError(
            f"target module '{target}' shares its weight with another layer, and {type(base).__name__} knows no other",
            "Leave it out of target_modules, or serve the adapter unmerged.",
        )


def _separate(base: nn.Module) -> None:
    seen: set[int] = set()
    for module, name, parameter in list(_uses(base)):
        if id(parameter) in seen:
            own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            module.register_parameter(name, own)
        seen.add(id(parameter))
    config = getattr(base, "config", None)
    for part in (config, getattr(config, "get_text_config", lambda: None)()):
        if part is not None:
            part.tie_word_embeddings = False
