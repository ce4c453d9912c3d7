"""What the bounds say of a posterior; adapters/test_scope.py tests that they keep losses finite."""

from __future__ import annotations

import math

import torch

from monteclora.posterior.bounds import BOUND, at_bound, rows_destroyed, rows_wider


def test_rows_are_counted_on_the_side_that_is_asked_for() -> None:
    rho = torch.tensor([0.0, 4.0, 5.0, -5.0, BOUND, 1e9, -BOUND, -1e9])
    assert rows_wider(rho, 100.0) == 3
    assert rows_wider(rho, math.exp(4.0) * 0.999) == 4
    assert rows_destroyed(rho, collapse=False) == 2
    assert rows_destroyed(rho, collapse=True) == 4
    assert at_bound(rho)
    assert not at_bound(rho[:4])
    assert rows_destroyed(torch.full((3,), math.nan), collapse=True) == 0  # told of as a weight that is not finite
