"""The entries of a draw against ``[mu +] row_scale [T] Xi`` layer by layer."""

from __future__ import annotations

import pytest
import torch

from monteclora.posterior.cells import filled
from monteclora.posterior.layout import LayerShape, Layout

LAYERS = [LayerShape("one", 2, 5), LayerShape("two", 3, 7), LayerShape("three", 2, 5)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("around_means", [False, True])
def test_every_block_is_the_formula_on_the_noise_of_its_layer(around_means: bool, full: bool) -> None:
    layout = Layout(LAYERS)
    other = torch.Generator().manual_seed(1)
    row_scale = torch.rand(sum(layer.rank for layer in LAYERS), generator=other) + 0.5
    factors = [torch.randn(layer.rank, layer.rank, generator=other) for layer in LAYERS] if full else None
    means = [torch.randn(layer.rank, layer.in_features, generator=other) for layer in LAYERS] if around_means else None
    ones = torch.ones_like(row_scale)
    _, noise = filled(layout, torch.Generator().manual_seed(0), ones, None, None)
    cells, blocks = filled(layout, torch.Generator().manual_seed(0), row_scale, factors, means)
    assert cells.numel() == sum(layer.rank * layer.in_features for layer in LAYERS)
    first = 0
    for i, (layer, block, xi) in enumerate(zip(LAYERS, blocks, noise, strict=True)):
        scale = row_scale[first : first + layer.rank]
        expected = xi.t() if factors is None else factors[i] @ xi.t()
        expected = scale.unsqueeze(-1) * expected
        if means is not None:
            expected = means[i] + expected
        torch.testing.assert_close(block, expected.t())
        first += layer.rank
