"""rho and eta within bounds: a diverging step ends in a large loss, not in numbers that are not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["BOUND", "WIDE", "at_bound", "bounded", "rows_destroyed", "rows_wider"]

BOUND = 20.0
"""Of the logarithms rho and eta: exp(2 * 20) and its sums stay far below the largest float32."""

WIDE = 100.0
"""A row's draws over its prior's: neither loss nor KL ever asks for as much, so that a step must have overshot."""


class _Bounded(torch.autograd.Function):
    """Clamps the value and passes the gradient through unchanged: that of a clamp is zero beyond the bound."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.clamp(-BOUND, BOUND) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


def bounded(rho: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """The two as they are used, of the same shapes and dtypes.

    The gradient is that at the bound, also where they are beyond it: the regulariser pulls them back.
    """
    found: tuple[Tensor, Tensor] = _Bounded.apply(rho, eta)
    return found


def at_bound(tensor: Tensor) -> bool:
    """Whether an entry of rho or eta is at the bound or beyond it; waits for the tensor's device."""
    return bool((tensor.detach().abs() >= BOUND).any())


def rows_wider(rho: Tensor, factor: float) -> int:
    """In how many rows draws are at least ``factor`` times as wide as the prior's; waits for the tensor's device.

    Args:
        rho: shape (R,), the logarithm of that ratio in each row.
        factor: above 0.
    """
    return int((rho.detach() >= math.log(factor)).sum())


def rows_destroyed(rho: Tensor, *, collapse: bool) -> int:
    """In how many rows nothing is left of the posterior: rho is at its upper bound, or at either.

    Args:
        rho: shape (R,).
        collapse: whether the lower bound counts, where draws are the mean.
    """
    return int(((rho.detach().abs() if collapse else rho.detach()) >= BOUND).sum())
