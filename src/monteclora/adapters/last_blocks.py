"""Which layers are drawn where noise is in the last blocks of a model alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from monteclora.errors import ConfigError
from monteclora.posterior import AdapterPosterior

__all__ = ["LastBlocks", "last_blocks"]


class LastBlocks(NamedTuple):
    """Which layers are drawn.

    Attributes:
        drawn: numbers of the drawn layers of each posterior.
        blocks: the list of blocks in which noise begins, from its first to its last.
        first: the place in it of the first block that is drawn.
        alone: whether every adapted block is in that list.
    """

    drawn: Mapping[AdapterPosterior, frozenset[int]]
    blocks: tuple[nn.Module, ...]
    first: int
    alone: bool


def last_blocks(model: nn.Module, layers: Mapping[AdapterPosterior, Collection[str]], count: int) -> LastBlocks:
    """The layers of the last ``count`` adapted blocks, and those behind all blocks.

    A block is an element of the outermost list of modules around a layer. Blocks are in the order in which the model
    has them, an encoder's before a decoder's.

    Args:
        model: that has the layers.
        layers: the names of each posterior's layers.
        count: at least 1.

    Raises:
        ConfigError: there are fewer adapted blocks.
    """
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    blocks = {name: _block_of(model, name) for names in layers.values() for name in names}
    found = sorted({block for block in blocks.values() if block}, key=order.__getitem__)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(found):
        has = f"{len(found)} adapted blocks" if found else "no list of blocks with an adapted layer"
        raise ConfigError(
            f"layers is {count!r}, and the model has {has}",
            f"Give a whole number from 1 to {len(found)}, or leave layers out." if found else "Leave layers out.",
        )
    chosen, begin = {*found[-count:]}, order[found[-count]]

    def is_drawn(name: str) -> bool:
        block = blocks[name]
        return order[name] > begin if block is None else block in chosen

    drawn = {p: frozenset(i for i, name in enumerate(names) if is_drawn(name)) for p, names in layers.items()}
    of_list, _, place = found[-count].rpartition(".")
    siblings = dict(model.get_submodule(of_list).named_children())
    return LastBlocks(
        drawn, tuple(siblings.values()), list(siblings).index(place), {b.rpartition(".")[0] for b in found} == {of_list}
    )


def _block_of(model: nn.Module, layer: str) -> str | None:
    """The name of the block that a layer is in; None for one in no list of modules."""
    module, parts = model, layer.split(".")
    for depth, part in enumerate(parts[:-1], 1):
        outer, module = module, module.get_submodule(part)
        if isinstance(outer, (nn.ModuleList, nn.ModuleDict)):
            return ".".join(parts[:depth])
    return None
