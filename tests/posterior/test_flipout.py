"""Random signs for each example: their values, shapes and independence."""

from __future__ import annotations

import torch

from monteclora.posterior.flipout import signs
from monteclora.posterior.layout import LayerShape

LAYERS = [LayerShape("one", 2, 5), LayerShape("two", 3, 7)]


def drawn(batch_size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs, rows = signs(LAYERS, batch_size, generator, torch.float32, torch.device("cpu"))
    assert [part.shape for part in inputs] == [(batch_size, layer.in_features) for layer in LAYERS]
    assert [part.shape for part in rows] == [(batch_size, layer.rank) for layer in LAYERS]
    return torch.cat([*inputs, *rows], -1)


def test_plus_and_minus_one_equally_often_and_independent() -> None:
    found = drawn(20_000)
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    moments = found.T @ found / len(found)
    error = 5 / len(found) ** 0.5
    assert found.mean(0).abs().max() < error
    assert (moments - torch.eye(len(moments))).abs().max() < error


def test_a_function_of_the_generator() -> None:
    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(3, seed=1))
