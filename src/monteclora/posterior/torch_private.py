"""Private names of torch, each with what it stands in for; a test fails when one changes.

The tests are in tests/posterior/test_torch_private.py. peft's and transformers' private names are in
``adapters/peft_private.py`` and ``adapters/transformers_private.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

__all__ = [
    "COMPILED",
    "MovableModule",
    "add_to_each",
    "in_backward",
    "original",
    "parameters_of",
    "parts_of",
    "standard_gamma",
    "standard_gamma_derivative",
    "versions",
]


def standard_gamma(shape: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws of Gamma(shape, 1), same shape and dtype. ``torch.distributions.Gamma`` takes no generator."""
    return torch._standard_gamma(shape, generator=generator)


def standard_gamma_derivative(shape: Tensor, draw: Tensor) -> Tensor:
    """The derivative of a draw with respect to its shape parameter at a fixed random number (implicit differentiation).

    ``torch.distributions`` computes it in its backward pass alone, where it is bound to the draw.
    """
    return torch._standard_gamma_grad(shape, draw)


def add_to_each(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """``tensors[i] += others[i]``, in one launch for all on a GPU; there is no public name for it."""
    torch._foreach_add_(list(tensors), list(others))


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was changed in place, by which autograd notices it too; there is no public name for it."""
    return [tensor._version for tensor in tensors]


def in_backward() -> bool:
    """Whether this thread runs inside a backward pass, as recomputation does. torch has no public name for it."""
    return torch._C._current_graph_task_id() != -1


def parts_of(module: nn.Module) -> Mapping[str, nn.Module]:
    """The modules registered in a module, by name.

    For what every layer asks in every step: attribute access tries everything else before it looks here. The four
    lookups of a LoRA layer take 12 microseconds as attributes and 1 microsecond in these dictionaries.
    """
    return cast(Mapping[str, nn.Module], module._modules)


def parameters_of(module: nn.Module) -> Mapping[str, Tensor | None]:
    """The parameters registered in a module, by name; for the same reason as :func:`parts_of`."""
    return module._parameters


COMPILED = "_orig_mod"
"""What ``torch.compile`` calls the module in its wrapper, also in the names of everything inside; there is no other."""


def original(module: nn.Module) -> nn.Module:
    """The module in a wrapper of ``torch.compile``; any other module as it is."""
    return cast(nn.Module, getattr(module, COMPILED, module))


class MovableModule(nn.Module):
    """A module that has a say in how ``to``, ``cuda``, ``double`` and the like change its tensors.

    All of them, and ``to_empty``, go through ``nn.Module._apply``; torch has no public hook for it.
    """

    def converted(self, before: Tensor, after: Tensor) -> Tensor:
        """What a tensor becomes: ``after``, the result of the conversion, unless a subclass decides otherwise."""
        return after

    def after_conversion(self) -> None:
        """Called when all tensors are converted."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda tensor: self.converted(tensor, fn(tensor)), recurse)
        self.after_conversion()
        return self
