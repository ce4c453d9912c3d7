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
    """Neighbouring layers of one width: their numbers, their rows and their cells."""

    in_features: int
    layers: tuple[int, ...]
    rows: slice
    cells: slice


class Layout:
    """The noise of all layers in one flat buffer of C = sum of r x n cells, R = sum of r rows.

    Neighbouring layers of one width, as all that read the hidden state are, make up a matrix: a handful of operations
    scale and reduce its rows.

    Args:
        layers: in the order of the buffer.
        limit: cells of a matrix of several layers.
    """

    def __init__(self, layers: Sequence[LayerShape], limit: int = LIMIT) -> None:
        self.ranks = [layer.rank for layer in layers]
        self.cells = 0
        self.matrices: list[Matrix] = []
        first_rows = [0, *accumulate(self.ranks)]
        for members in _grouped(layers, limit):
            n, rows = layers[members[0]].in_features, slice(first_rows[members[0]], first_rows[members[-1] + 1])
            cells = slice(self.cells, self.cells + n * (rows.stop - rows.start))
            self.matrices.append(Matrix(n, members, rows, cells))
            self.cells = cells.stop

    def rows_of(self, flat: Tensor, matrix: Matrix) -> Tensor:
        """A matrix in ``flat``, shape (..., C): a view of shape (..., rows, n)."""
        rows: Tensor = flat[..., matrix.cells].unflatten(-1, (-1, matrix.in_features))
        return rows

    def blocks_of(self, rows: Tensor, matrix: Matrix, dim: int = -2) -> tuple[Tensor, ...]:
        """Its layers' matrices: views of shape (..., r, n), or along dimension -1 of its transpose (..., n, r)."""
        blocks: tuple[Tensor, ...] = rows.split([self.ranks[i] for i in matrix.layers], dim)
        return blocks

    def transposed_blocks(self, flat: Tensor) -> list[Tensor]:
        """The layers' parts of ``flat``, shape (..., C), transposed: views of shape (..., n, r)."""
        return [
            block
            for matrix in self.matrices
            for block in self.blocks_of(self.rows_of(flat, matrix).transpose(-1, -2), matrix, -1)
        ]

    def row_products(
        self, blocks: Sequence[Tensor | None], flat: Tensor, means: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Scalar product of every row with the same row of ``flat``, or of its distance from the means.

        Args:
            blocks: each layer's matrix, shape (r, n); None stands for zeros.
            flat: shape (C,).
            means: each layer's mean, shape (r, n), which ``flat`` contains.

        Returns:
            Shape (R,).
        """
        return torch.cat([self._products(blocks, flat, means, matrix) for matrix in self.matrices])

    def _products(
        self, blocks: Sequence[Tensor | None], flat: Tensor, means: Sequence[Tensor] | None, matrix: Matrix
    ) -> Tensor:
        rows = self.rows_of(flat, matrix)
        given = [block for i in matrix.layers if (block := blocks[i]) is not None]
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
    """Numbers of neighbouring layers of one width, no more at once than the limit allows."""
    members: list[int] = []
    cells = 0
    for i, layer in enumerate(layers):
        size = layer.rank * layer.in_features
        if members and (layer.in_features != layers[members[0]].in_features or cells + size > limit):
            yield tuple(members)
            members, cells = [], 0
        members.append(i)
        cells += size
    yield tuple(members)
