"""Functions of torch without a public name, each with what it stands in for; a test fails when one changes.

Beside these, adapters/layers.py and adapters/tuner.py read ``_modules`` and ``_parameters`` of modules where attributes
would be too slow, and use private names of peft and transformers: tests/adapters/test_private_names.py has them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_to_each", "in_backward", "standard_gamma", "standard_gamma_slope", "versions"]


def standard_gamma(shape: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws of Gamma(shape, 1), same shape and dtype. ``torch.distributions.Gamma`` takes no generator."""
    return torch._standard_gamma(shape, generator=generator)


def standard_gamma_slope(shape: Tensor, draw: Tensor) -> Tensor:
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
