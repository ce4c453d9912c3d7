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

    def draws(self, model: nn.Module, first: int, count: int) -> AbstractContextManager[None]:
        """Draws ``first``, ... for passes over a batch ``count`` times over; see the protocol of the same name."""
        return posterior_sampling(model, self.seed, num_samples=count, first=first, resample=False)
