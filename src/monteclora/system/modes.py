"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; every module's mode is restored after it.

    A model that is in evaluation mode already is not touched: several threads may predict with it.
    """
    modes = [(module, module.training) for module in model.modules()]
    if any(mode for _, mode in modes):
        model.eval()
    else:
        modes = []
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
