"""A classifier as a linear function of its weights: the logits of rows, and their slopes in the weights.

Rows go through the model one at a time, so that a backward pass for each class gives the slopes of that row alone; with
them every draw of the weights costs a product, however many draws there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["moved_logits", "slopes"]


def slopes(logits: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a row's logits, (C,), in each weight: (C, *shape), float32; zeros where a weight has no part in them."""
    rows = [torch.autograd.grad(logit, weights, retain_graph=True, allow_unused=True) for logit in logits]
    columns = zip(weights, zip(*rows, strict=True), strict=True)
    return tuple(
        torch.stack([torch.zeros_like(weight) if slope is None else slope for slope in each]).float()
        for weight, each in columns
    )


def moved_logits(
    logits_of: Callable[[Mapping[str, Tensor], int], Tensor],
    point: Mapping[str, Tensor],
    deviations: Sequence[Mapping[str, Tensor]],
    rows: int,
) -> Tensor:
    """f + J (w - point) of every row for every w, float32, (S, B, C).

    Args:
        logits_of: weights by name and the number of a row to its logits, (C,).
        point: the weights around which f is linearised.
        deviations: w - point of each w, by name; their dtype and device may be others than the point's.
        rows: B.
    """
    leaves = {name: weight.detach().requires_grad_() for name, weight in point.items()}
    moves = [
        torch.stack([each[name].flatten() for each in deviations]).to(weight.device, torch.float32)
        for name, weight in leaves.items()
    ]
    found = []
    with torch.enable_grad(), _uncached_casts():
        for row in range(rows):
            logits = logits_of(leaves, row)
            each = slopes(logits, list(leaves.values()))
            change = sum(move @ slope.flatten(1).T for move, slope in zip(moves, each, strict=True))
            found.append(logits.detach().float() + change)
    return torch.stack(found, 1)


@contextmanager
def _uncached_casts() -> Iterator[None]:
    """Autocast keeps no casts of weights: it would hold on to those of every call until its own block ends."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
