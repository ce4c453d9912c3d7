"""Tensors in nested tuples, lists and mappings: what a module is called with, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Place", "leaves", "mapped"]

Place = tuple[int | str, ...]
"""Where a tensor is: numbers and keys from the outside in."""


def leaves(value: Any, at: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """The tensors in nested tuples, lists and mappings, with their places; what else there is has none."""
    if isinstance(value, Tensor):
        yield at, value
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from leaves(part, (*at, number))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, (*at, key))


def mapped(value: Any, change: Callable[[Place, Tensor], Tensor], at: Place = ()) -> Any:
    """The same nested value with other tensors."""
    if isinstance(value, Tensor):
        return change(at, value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(mapped(part, change, (*at, number)) for number, part in enumerate(value))
    if type(value) is dict:
        return {key: mapped(part, change, (*at, key)) for key, part in value.items()}
    return value
