"""A model sharded over the processes of a run (FSDP2), through torch's public interface.

accelerate only says that sharding was asked for: its own preparation would shard rho and eta too, which are needed
outside of the blocks that FSDP gathers, and it does not shard on CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from monteclora.errors import ConfigError
from monteclora.methods.base import Method
from monteclora.system.devices import is_main_process, process_count

__all__ = [
    "as_sharded",
    "check_launch",
    "gathered",
    "is_requested",
    "is_sharded",
    "reshard",
    "separated",
    "shard",
    "whole",
]

Tree = TypeVar("Tree")
_HINT = "Launch it with --use_fsdp --fsdp_version 2 alone, or without."


def is_requested() -> bool:
    """Whether ``accelerate launch`` was asked to shard the model."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and process_count() > 1


def check_launch(quantization: str, precision: str) -> None:
    """Refuse launches that a run cannot be trained with, before anything is loaded.

    Args:
        quantization, precision: the recipe's ``model.quantization`` and ``training.precision``.

    Raises:
        ConfigError: DeepSpeed, Megatron-LM, FSDP1, or options of FSDP2 that do not fit.
    """
    for name, flag in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM")):
        if parse_flag_from_env(flag):
            raise ConfigError(f"a run cannot be launched with {name}", _HINT)
    if not is_requested():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"a run cannot be launched with FSDP {version}, which flattens weights together", _HINT)
    for flag, instead in (
        ("FSDP_OFFLOAD_PARAMS", "Launch without --fsdp_offload_params."),
        ("FSDP_ACTIVATION_CHECKPOINTING", "Set training.gradient_checkpointing to true instead."),
    ):
        if parse_flag_from_env(flag):
            raise ConfigError(f"a run cannot be launched with {flag}", instead)
    if quantization != "none":
        raise ConfigError(
            f"model.quantization {quantization} cannot be sharded by FSDP: weights are packed into bytes",
            "Set it to none, or launch without --use_fsdp.",
        )
    if precision == "fp16":
        raise ConfigError("training.precision fp16 cannot be combined with FSDP", "Set it to bf16 or fp32.")


def shard(model: nn.Module, method: Method, device: torch.device) -> list[nn.Parameter]:
    """Shard a model in place, block by block; a model that is sharded already stays as it is.

    Args:
        model: as the method wrapped it, the same on every process.
        method: says which parts every process keeps whole.
        device: of this process.

    Returns:
        The parameters of these parts; their gradients are not averaged over the processes.
    """
    kept = method.kept_whole(model)
    whole = [parameter for module in kept for parameter in module.parameters()]
    if not is_sharded(model):
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (process_count(),)),
            "ignored_params": set(whole),
        }
        for block in _blocks(model, kept):
            fully_shard(block, reshard_after_forward=True, **options)
        fully_shard(model, **options)
        for module in kept:
            module.to(device)
    return whole


def _blocks(model: nn.Module, kept: list[nn.Module]) -> list[nn.Module]:
    """The elements of the outermost lists of modules: the transformer's blocks, and experts only as parts of them."""
    apart = {id(part) for module in kept for part in module.modules()}
    found: list[nn.Module] = []
    waiting = [model]
    while waiting:
        for child in waiting.pop().children():
            if isinstance(child, nn.ModuleList):
                found += [block for block in child if id(block) not in apart and any(True for _ in block.parameters())]
            else:
                waiting.append(child)
    return found


def separated(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of an optimiser in which sharded and whole parameters are apart: no fused kernel takes both."""
    parts: list[dict[str, Any]] = []
    for group in groups:
        sharded = [parameter for parameter in group["params"] if isinstance(parameter, DTensor)]
        plain = [parameter for parameter in group["params"] if not isinstance(parameter, DTensor)]
        parts += [{**group, "params": sharded}, {**group, "params": plain}] if sharded and plain else [group]
    return parts


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` has sharded it."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass in evaluation has left gathered: the model has its sharded parameters again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module, names: Container[str]) -> Iterator[None]:
    """In the block the main process has some parameters whole, on the CPU, to be saved.

    All processes must enter it. A model that is not sharded stays as it is.

    Args:
        model: as :func:`shard` left it, or a whole one.
        names: of the parameters.
    """
    reshard(model)
    wanted = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    sharded: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor) and id(parameter) in wanted:
                sharded[id(parameter)] = parameter
                places.setdefault(id(parameter), []).append((module, name))
    for key, parameter in sharded.items():
        full = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)  # all processes take part
        for module, name in places[key] if is_main_process() else []:
            setattr(module, name, full)
    try:
        yield
    finally:
        for key, parameter in sharded.items():
            for module, name in places[key]:
                setattr(module, name, parameter)


def whole(tree: Tree) -> Tree:
    """Nested dictionaries and lists with every sharded tensor in them made whole; all processes must call it."""
    found: Any = tree
    if isinstance(tree, DTensor):
        found = tree.full_tensor().cpu()
    elif isinstance(tree, Mapping):
        found = {name: whole(value) for name, value in tree.items()}
    elif isinstance(tree, list):
        found = [whole(value) for value in tree]
    return cast(Tree, found)


def as_sharded(value: Any, parameter: Tensor) -> Any:
    """A whole tensor of a sharded parameter's shape, sharded as the parameter is; anything else as it is."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
