"""Posterior draws as a sampler of predictions."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from monteclora.adapters.active import posterior_sampling

__all__ = ["Posterior"]


@dataclass(frozen=True)
class Posterior:
    """S draws from the posterior of a MonteCLoRA adapter; see :class:`monteclora.prediction.sampler.Sampler`.

    Attributes:
        num_samples: S.
        seed: the stream of draws.
    """

    num_samples: int
    seed: int = 0
    name: str = "posterior"

    def draw(self, model: nn.Module, number: int) -> AbstractContextManager[None]:
        """Draw ``number`` of the stream, for all forward passes in the block."""
        return posterior_sampling(model, self.seed, first=number, resample=False)
