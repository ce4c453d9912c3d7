"""Monte Carlo dropout (Gal & Ghahramani 2016): predictions under draws of the dropout masks of training.

A mask has one entry for each input feature of a dropout layer and is shared by all rows and positions, so that a draw
is one thinned network: the same function for every row, whatever else is in the batch and however it is padded. The
marginal law of a row's prediction is that of variational dropout (Gal & Ghahramani 2016, "A theoretically grounded
application of dropout in recurrent neural networks"). Dropout of attention probabilities, whose entries belong to
pairs of positions and not to features, stays off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from monteclora.errors import ConfigError

__all__ = ["MCDropout", "dropout_layers"]


class _Masks:
    """The masks of one draw, made when a layer first asks for its own."""

    def __init__(self, seed: int, number: int, names: dict[nn.Module, str]) -> None:
        self.seed, self.number, self.names = seed, number, names
        self.made: dict[tuple[str, int, torch.device, torch.dtype], Tensor] = {}

    def of(self, layer: nn.Dropout, x: Tensor) -> Tensor:
        """Shape (features,): 0 where dropped, 1 / (1 - p) elsewhere."""
        name, width = self.names[layer], x.shape[-1]
        key = (name, width, x.device, x.dtype)
        if key not in self.made:
            digest = hashlib.blake2b(f"{self.seed},{self.number},{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            # on the CPU: a draw is the same on every device
            kept = torch.rand(width, generator=generator) >= layer.p
            self.made[key] = (kept / (1.0 - layer.p)).to(x.device, x.dtype)
        return self.made[key]


_current: ContextVar[_Masks | None] = ContextVar("masks", default=None)
_hooked: WeakSet[nn.Module] = WeakSet()


def _thinned(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    # computed from the input: a copied model, whose layers are hooked a second time, drops nothing twice
    masks, x = _current.get(), args[0]
    # attention probabilities, (B, heads, T, T), where they have a layer of their own: their last axis is no feature
    if masks is None or layer not in masks.names or x.dim() > 3:
        return None
    return x * masks.of(layer, x)


def dropout_layers(model: nn.Module) -> dict[str, nn.Dropout]:
    """The dropout layers with a rate above 0 and below 1, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Dropout) and 0.0 < m.p < 1.0}


@dataclass(frozen=True)
class MCDropout:
    """S thinned networks; see :class:`monteclora.prediction.sampler.Sampler`.

    Attributes:
        num_samples: S.
        seed: the stream of masks.
    """

    num_samples: int
    seed: int = 0
    name: str = "mc_dropout"

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError for a model without dropout: every draw would be the mean."""
        if dropout_layers(model):
            return
        configs: dict[str, Any] = getattr(model, "peft_config", {})
        may_have = any(hasattr(config, "lora_dropout") for config in configs.values())
        raise ConfigError(
            "the sampler mc_dropout needs a dropout rate above 0, and the model has no such layer",
            f"{'Train with method.lora_dropout above 0, or choose' if may_have else 'Choose'} another sampler.",
        )

    @contextmanager
    def draw(self, model: nn.Module, number: int) -> Iterator[None]:
        """Forward passes in the block see the masks of draw ``number``; the model stays in evaluation mode.

        Raises:
            ConfigError: the model has no dropout.
        """
        self.check(model)
        layers = dropout_layers(model)
        for layer in layers.values():
            if layer not in _hooked:  # for good: a hook that came and went would be seen by other threads
                layer.register_forward_hook(_thinned)
                _hooked.add(layer)
        token = _current.set(_Masks(self.seed, number, {layer: name for name, layer in layers.items()}))
        try:
            yield
        finally:
            _current.reset(token)
