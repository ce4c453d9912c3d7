"""A draw of its own for every example of a batch, by random signs (Wen et al. 2018, arXiv 1803.04386).

See docs/method.md, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from monteclora.posterior.layout import LayerShape

__all__ = ["Signs", "signs"]

Signs: TypeAlias = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def signs(
    layers: Sequence[LayerShape],
    batch_size: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> Signs:
    """Independent signs, +1 or -1, of every example.

    Args:
        layers: the adapted layers.
        batch_size: B, examples.
        generator: of the signs, on ``device``.
        dtype, device: of the signs.

    Returns:
        For each layer the signs of its inputs, shape (B, n), and of its rows, shape (B, r).
    """
    into = [layer.in_features for layer in layers]
    out = [layer.rank for layer in layers]
    width = sum(into) + sum(out)
    count = batch_size * width
    octets = torch.empty(-(-count // 8), dtype=torch.uint8, device=device)
    octets.random_(generator=generator)
    bits = octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=device) & 1
    values = bits.view(-1)[:count].to(dtype).mul_(2).sub_(1).view(batch_size, width)
    columns, rows = values.split([sum(into), sum(out)], -1)
    return columns.split(into, -1), rows.split(out, -1)
