"""What a layer is called: in an adapter's files, in the model, and by another version of transformers.

``torch.compile`` puts ``_orig_mod`` into the names of what it wraps. Files have none of it: they would then fit no
other model, and no server. Versions of transformers have renamed layers; peft follows them for weights, and so the
posterior's layers are followed with peft's own function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from peft import LoraConfig, PeftModel
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors.torch import load_file, save
from torch import nn

from monteclora.errors import CheckpointError
from monteclora.posterior.torch_private import COMPILED
from monteclora.system.atomic import write_file

__all__ = ["current_names", "key_mapping_for", "localised", "names_in", "plain_file", "plain_name", "plain_patterns"]

_PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """A name without what ``torch.compile`` puts into it."""
    return ".".join(part for part in name.split(".") if part != COMPILED) if COMPILED in name else name


def names_in(path: Path) -> list[str]:
    """The names of an adapter's tensors.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error})",
            "Take the folder from a backup or an earlier checkpoint.",
        ) from error


def plain_file(path: Path) -> None:
    """Give the tensors of an adapter's file their plain names; a file that has them is left as it is."""
    if any(COMPILED in name for name in names_in(path)):
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        write_file(path, save({plain_name(name): value for name, value in load_file(path).items()}, metadata=metadata))


def _names_of_patterns(config: LoraConfig) -> Iterator[tuple[str, Any]]:
    for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save"):
        value = getattr(config, name, None)
        if isinstance(value, (dict, list, set)):
            yield name, value


def _renamed(value: Any, rename: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {rename.get(name, name): rank for name, rank in value.items()}
    return type(value)(rename.get(name, name) for name in value)


def plain_patterns(config: LoraConfig) -> None:
    """Give the layers that a configuration names, in place, their plain names."""
    for field, value in _names_of_patterns(config):
        setattr(config, field, _renamed(value, {name: plain_name(name) for name in value}))


def localised(config: LoraConfig, model: nn.Module) -> None:
    """Give the layers that a configuration names in full, in place, the names of a model with compiled parts."""
    actual = _actual_names(model)
    if actual:
        for field, value in _names_of_patterns(config):
            setattr(config, field, _renamed(value, actual))


def _actual_names(model: nn.Module) -> dict[str, str]:
    """The names of a model's modules by their plain ones; empty where no part of it is compiled."""
    names = [name for name, _ in model.named_modules()]
    if not any(COMPILED in name for name in names):
        return {}
    return {plain_name(name): name for name in names if name.rpartition(".")[2] != COMPILED or name == COMPILED}


def key_mapping_for(
    model: nn.Module, keys: Iterable[str], key_mapping: Mapping[str, str] | None
) -> dict[str, str] | None:
    """A ``key_mapping`` for peft with which saved tensors get the names that they have in the model.

    Args:
        model: the base model, adapted or not.
        keys: the tensors' names in the file.
        key_mapping: of the user, which comes first.

    Returns:
        ``key_mapping`` itself where neither the file nor the model has compiled parts; else a pattern for each tensor.
    """
    keys = [key.removeprefix(_PREFIX) for key in keys]
    actual = _actual_names(model)
    if not actual and not any(COMPILED in key for key in keys):
        return None if key_mapping is None else dict(key_mapping)
    found = {}
    for key in keys:
        name = plain_name(mapped(key, key_mapping or {}))
        module, _, rest = name.rpartition(".")
        while module and module not in actual:
            module, _, part = module.rpartition(".")
            rest = f"{part}.{rest}"
        local = ".".join(filter(None, (actual.get(module, module), rest)))
        found[f"^{re.escape(key)}$"] = local.replace("\\", r"\\")
    return found


def mapped(name: str, key_mapping: Mapping[str, str]) -> str:
    """A stored name after the first pattern of peft's ``key_mapping`` that applies."""
    for pattern, replacement in key_mapping.items():
        found, count = re.subn(pattern, replacement, name)
        if count:
            return found
    return name


def current_names(
    model: PeftModel, config: LoraConfig, names: Sequence[str], key_mapping: Mapping[str, str] | None, source: Path
) -> list[str]:
    """What layers of a file are called in the model that it is loaded into, in the file's order.

    Args:
        model: with the adapter or without.
        config: of the adapter.
        names: of layers, as they are stored.
        key_mapping: of the user.
        source: the file.

    Raises:
        CheckpointError: transformers has made one layer of several.
    """
    names = [plain_name(mapped(name, key_mapping or {})) for name in names]
    numbers = {_weight(name): torch.tensor([[float(number)]]) for number, name in enumerate(names)}
    converted = convert_peft_adapter_state_dict_for_transformers(model, config, numbers, "default")
    if any(value.numel() != 1 for value in converted.values()) or len(converted) != len(names):
        raise CheckpointError(
            f"{source}: this version of transformers makes one layer of several that the posterior was trained on",
            "Load it with the version it was trained with, or peft.PeftModel.from_pretrained for the mean alone.",
        )
    found = {int(value.item()): key for key, value in converted.items()}
    return [
        found[number].removeprefix(_PREFIX).removesuffix(_weight("").removeprefix(_PREFIX))
        for number in range(len(names))
    ]


def _weight(layer: str) -> str:
    return f"{_PREFIX}{layer}.lora_A.weight"
