from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from monteclora.posterior import LayerShape
from monteclora.posterior.layout import Layout

SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=7)


def layout_of(shapes: list[tuple[int, int]], limit: int = 25) -> Layout:
    return Layout([LayerShape(f"layer{i}", rank, columns) for i, (rank, columns) in enumerate(shapes)], limit)


@given(SHAPES)
def test_every_cell_belongs_to_one_layer(shapes):
    layout = layout_of(shapes)
    flat = torch.arange(layout.cells)
    blocks = layout.transposed_blocks(flat)
    assert [tuple(block.t().shape) for block in blocks] == shapes
    assert torch.equal(torch.cat([block.t().flatten() for block in blocks]), flat)


@given(SHAPES, st.integers(1, 3))
def test_draws_made_at_once_are_cut_alike(shapes, count):
    layout = layout_of(shapes)
    flats = torch.randn(count, layout.cells)
    for together, *alone in zip(layout.transposed_blocks(flats), *map(layout.transposed_blocks, flats), strict=True):
        assert torch.equal(together, torch.stack(alone))


@given(SHAPES, st.data())
def test_products_of_rows_leave_out_what_is_not_given(shapes, data):
    layout = layout_of(shapes)
    flat = torch.randn(layout.cells, dtype=torch.float64)
    given_blocks = [torch.randn(shape, dtype=torch.float64) if data.draw(st.booleans()) else None for shape in shapes]
    kept = [None if block is None else block.clone() for block in given_blocks]
    products = layout.row_products(given_blocks, flat)
    expected = [
        torch.zeros(part.shape[-1], dtype=torch.float64) if block is None else (block * part.t()).sum(-1)
        for block, part in zip(given_blocks, layout.transposed_blocks(flat), strict=True)
    ]
    torch.testing.assert_close(products, torch.cat(expected))
    # gradients belong to whoever hands them in
    assert all(one is two is None or torch.equal(one, two) for one, two in zip(given_blocks, kept, strict=True))


def test_neighbours_of_one_width_are_one_matrix():
    layout = layout_of([(2, 5), (1, 3), (4, 5), (1, 5), (3, 5)], limit=30)
    assert [matrix.layers for matrix in layout.matrices] == [(0,), (1,), (2, 3), (4,)]
    assert [matrix.rows for matrix in layout.matrices] == [slice(0, 2), slice(2, 3), slice(3, 8), slice(8, 11)]


@given(SHAPES, st.integers(1, 60))
def test_the_limit_parts_matrices_and_moves_nothing(shapes, limit):
    whole, parted = layout_of(shapes, 10**6), layout_of(shapes, limit)
    flat = torch.arange(whole.cells)
    assert all(map(torch.equal, whole.transposed_blocks(flat), parted.transposed_blocks(flat)))
    for matrix in parted.matrices:
        assert len(matrix.layers) == 1 or matrix.cells.stop - matrix.cells.start <= limit


def test_no_layer_copies_the_noise():
    layout = layout_of([(2, 5), (1, 3)])
    flat = torch.randn(layout.cells)
    storage = flat.untyped_storage().data_ptr()
    assert {block.untyped_storage().data_ptr() for block in layout.transposed_blocks(flat)} == {storage}
