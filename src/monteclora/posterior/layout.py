"""Where the rows and the noise of every layer lie in flat buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LayerShape", "Layout"]


class LayerShape(NamedTuple):
    """One adapted layer: ``A`` is rank x in_features."""

    name: str
    rank: int
    in_features: int


class _Width(NamedTuple):
    """The layers of one width: their numbers, their rows and cells in the order of the layout."""

    in_features: int
    layers: tuple[int, ...]
    rows: slice
    cells: slice


class Layout:
    """The noise of all layers in one flat buffer of C = sum of r x n cells, R = sum of r rows.

    Layers of one width lie side by side, in their own order: the rows of each width are one matrix, which a handful of
    operations scale and reduce, however many layers there are.

    Args:
        layers: in a fixed order. Rows elsewhere follow it; ``row_order`` leads from there to here.
    """

    def __init__(self, layers: Sequence[LayerShape]) -> None:
        self.ranks = [layer.rank for layer in layers]
        self.cells = 0
        self.row_order: list[int] = []
        self._widths: list[_Width] = []
        first_rows = [sum(self.ranks[:i]) for i in range(len(layers))]
        for n in dict.fromkeys(layer.in_features for layer in layers):
            members = tuple(i for i, layer in enumerate(layers) if layer.in_features == n)
            first_row, first_cell = len(self.row_order), self.cells
            for i in members:
                self.row_order += range(first_rows[i], first_rows[i] + self.ranks[i])
            rows = slice(first_row, len(self.row_order))
            self.cells += n * (rows.stop - rows.start)
            self._widths.append(_Width(n, members, rows, slice(first_cell, self.cells)))

    def _matrix(self, flat: Tensor, width: _Width) -> Tensor:
        return flat[..., width.cells].unflatten(-1, (-1, width.in_features))

    def scale_rows(self, flat: Tensor, scale: Tensor) -> None:
        """Multiply every row by its number, in place.

        Args:
            flat: shape (C,).
            scale: shape (R,), in the order of the layout.
        """
        for width in self._widths:
            self._matrix(flat, width).mul_(scale[width.rows].unsqueeze(-1))

    def blocks(self, flat: Tensor) -> list[Tensor]:
        """The layers' parts of ``flat``, shape (..., C), in the layers' order: views of shape (..., r, n)."""
        found: dict[int, Tensor] = {}
        for width in self._widths:
            parts = self._matrix(flat, width).split([self.ranks[i] for i in width.layers], -2)
            found.update(zip(width.layers, parts, strict=True))
        return [found[i] for i in range(len(self.ranks))]

    def row_products(self, blocks: Sequence[Tensor | None], flat: Tensor) -> Tensor:
        """Scalar product of every row with the same row of ``flat``.

        Args:
            blocks: each layer's matrix, shape (r, n), in the layers' order; None stands for zeros.
            flat: shape (C,).

        Returns:
            Shape (R,), in the order of the layout.
        """
        return torch.cat([self._products([blocks[i] for i in w.layers], flat, w) for w in self._widths])

    def _products(self, blocks: Sequence[Tensor | None], flat: Tensor, width: _Width) -> Tensor:
        matrix = self._matrix(flat, width)
        given = [block for block in blocks if block is not None]
        if len(given) == len(blocks):
            return torch.cat(given).mul_(matrix).sum(-1)
        # with reentrant checkpointing the gradients come block by block, and the others' cells are not to be touched
        products = flat.new_zeros(matrix.shape[0])
        row = 0
        for number, block in zip(width.layers, blocks, strict=True):
            rows = slice(row, row + self.ranks[number])
            if block is not None:
                products[rows] = (block * matrix[rows]).sum(-1)
            row = rows.stop
        return products
