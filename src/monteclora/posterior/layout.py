"""Where the rows and the noise of every layer lie in flat buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LIMIT", "LayerShape", "Layout", "Matrix"]


class LayerShape(NamedTuple):
    """One adapted layer: ``A`` is rank x in_features."""

    name: str
    rank: int
    in_features: int


# cells of a matrix of several layers: as many as temporary copies may take
LIMIT = 1 << 20


class Matrix(NamedTuple):
    """Layers of one width: their numbers, their rows and cells in the order of the layout."""

    in_features: int
    layers: tuple[int, ...]
    rows: slice
    cells: slice


class Layout:
    """The noise of all layers in one flat buffer of C = sum of r x n cells, R = sum of r rows.

    Layers of one width lie side by side, in their own order: their rows are a matrix, which a handful of operations
    draw, scale and reduce, however many layers there are.

    Args:
        layers: in a fixed order. Rows elsewhere follow it; ``row_order`` leads from there to here.
        limit: cells of a matrix of several layers.
    """

    def __init__(self, layers: Sequence[LayerShape], limit: int = LIMIT) -> None:
        self.ranks = [layer.rank for layer in layers]
        self.cells = 0
        self.row_order: list[int] = []
        self.matrices: list[Matrix] = []
        first_rows = [0, *accumulate(self.ranks)]
        for members in _grouped(layers, limit):
            first_row, first_cell, n = len(self.row_order), self.cells, layers[members[0]].in_features
            for i in members:
                self.row_order += range(first_rows[i], first_rows[i + 1])
            rows = slice(first_row, len(self.row_order))
            self.cells += n * (rows.stop - rows.start)
            self.matrices.append(Matrix(n, members, rows, slice(first_cell, self.cells)))

    def rows_of(self, flat: Tensor, matrix: Matrix) -> Tensor:
        """A matrix in ``flat``, shape (..., C): a view of shape (..., rows, n)."""
        return flat[..., matrix.cells].unflatten(-1, (-1, matrix.in_features))

    def blocks_of(self, rows: Tensor, matrix: Matrix) -> tuple[Tensor, ...]:
        """The matrices of its layers, in their own order: views of shape (..., r, n)."""
        return rows.split([self.ranks[i] for i in matrix.layers], -2)

    def blocks(self, flat: Tensor) -> list[Tensor]:
        """The layers' parts of ``flat``, shape (..., C), in the layers' order: views of shape (..., r, n)."""
        found: dict[int, Tensor] = {}
        for matrix in self.matrices:
            found.update(zip(matrix.layers, self.blocks_of(self.rows_of(flat, matrix), matrix), strict=True))
        return [found[i] for i in range(len(self.ranks))]

    def row_products(
        self, blocks: Sequence[Tensor | None], flat: Tensor, means: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Scalar product of every row with the same row of ``flat``, or of its distance from the means.

        Args:
            blocks: each layer's matrix, shape (r, n), in the layers' order; None stands for zeros.
            flat: shape (C,).
            means: each layer's mean, shape (r, n), which ``flat`` contains.

        Returns:
            Shape (R,), in the order of the layout.
        """
        return torch.cat([self._products(blocks, flat, means, matrix) for matrix in self.matrices])

    def _products(
        self, blocks: Sequence[Tensor | None], flat: Tensor, means: Sequence[Tensor] | None, matrix: Matrix
    ) -> Tensor:
        rows = self.rows_of(flat, matrix)
        given = [blocks[i] for i in matrix.layers if blocks[i] is not None]
        if len(given) == len(matrix.layers):
            noise = rows if means is None else rows - torch.cat([means[i] for i in matrix.layers])
            return torch.cat(given).mul_(noise).sum(-1)
        # with reentrant checkpointing the gradients come block by block, and the others' cells are not to be touched
        products = flat.new_zeros(len(rows), 1)
        parts = zip(matrix.layers, self.blocks_of(rows, matrix), self.blocks_of(products, matrix), strict=True)
        for i, part, product in parts:
            block = blocks[i]
            if block is not None:
                product.copy_((block * (part if means is None else part - means[i])).sum(-1, keepdim=True))
        return products.squeeze(-1)


def _grouped(layers: Sequence[LayerShape], limit: int) -> Iterator[tuple[int, ...]]:
    """Numbers of layers of one width, no more at once than the limit allows."""
    for n in dict.fromkeys(layer.in_features for layer in layers):
        members: list[int] = []
        for i, layer in enumerate(layers):
            if layer.in_features == n:
                if members and n * sum(layers[j].rank for j in (*members, i)) > limit:
                    yield tuple(members)
                    members = []
                members.append(i)
        yield tuple(members)
