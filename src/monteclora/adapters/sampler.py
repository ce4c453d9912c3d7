"""Posterior draws as a sampler of predictions."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from monteclora.adapters.active import drawn_blocks, keeping_prefix, posterior_sampling

__all__ = ["Posterior"]


@dataclass(frozen=True)
class Posterior:
    """S draws from the posterior of a MonteCLoRA adapter; see :class:`monteclora.prediction.sampler.Sampler`.

    Attributes:
        num_samples: S.
        seed: the stream of draws.
        layers: the last adapted blocks that are drawn; None draws in all.
    """

    num_samples: int
    seed: int = 0
    name: str = "posterior"
    layers: int | None = None

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError for a model with fewer adapted blocks than are to be drawn."""
        if self.layers is not None:
            drawn_blocks(model, self.layers)

    @property
    def shares_passes(self) -> bool:
        """Whether draws of one forward pass share a part of it."""
        return self.layers is not None

    @property
    def keeps_shared(self) -> bool:
        """Whether passes over the same rows can keep what draws share."""
        return self.layers is not None

    def keeping(self, model: nn.Module) -> AbstractContextManager[None]:
        """Passes in the block are over the same rows: the blocks below those that are drawn run once."""
        return keeping_prefix(model)

    def draw(self, model: nn.Module, number: int) -> AbstractContextManager[None]:
        """Draw ``number`` of the stream, for all forward passes in the block."""
        return posterior_sampling(model, self.seed, first=number, resample=False, layers=self.layers)

    def draws(self, model: nn.Module, first: int, count: int) -> AbstractContextManager[None]:
        """Draws ``first``, ... for passes over a batch ``count`` times over; see the protocol of the same name."""
        return posterior_sampling(model, self.seed, num_samples=count, first=first, resample=False, layers=self.layers)
