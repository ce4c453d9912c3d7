"""The entries of one draw of every layer, in one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monteclora.posterior.layout import Layout
from monteclora.posterior.torch_private import add_to_each

__all__ = ["filled"]


def filled(
    layout: Layout,
    generator: torch.Generator,
    row_scale: Tensor,
    factors: Sequence[Tensor] | None,
    means: Sequence[Tensor] | None,
) -> tuple[Tensor, list[Tensor]]:
    """``[mu +] row_scale [T] Xi`` with Xi standard normal (docs/method.md section 2).

    Args:
        layout: of the layers.
        generator: of Xi, on the device of ``row_scale``.
        row_scale: shape (R,); the entries have its dtype.
        factors: T of every layer, shape (r, r); None where the covariance is diagonal.
        means: mu of every layer, shape (r, n); None where layers add their own.

    Returns:
        The entries, flat, and the same memory as one block of shape (n, r) for each layer.
    """
    cells = torch.empty(layout.cells, dtype=row_scale.dtype, device=row_scale.device)
    cells.normal_(generator=generator)
    scale = row_scale.unsqueeze(-1)
    found: list[Tensor] = []
    for matrix in layout.matrices:
        rows = layout.rows_of(cells, matrix)
        blocks = layout.blocks_of(rows.t(), matrix, -1)
        if factors is not None:
            # autocast would round the noise to the precision of the model's matmuls
            with torch.autocast(cells.device.type, enabled=False):
                for i, block in zip(matrix.layers, blocks, strict=True):
                    block.copy_((factors[i] @ block.t()).t())
        rows.mul_(scale[matrix.rows])
        if means is not None:
            add_to_each(blocks, [means[i].t() for i in matrix.layers])
        found += blocks
    return cells, found
