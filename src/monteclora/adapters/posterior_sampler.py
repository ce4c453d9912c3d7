"""The draws that evaluation-mode forward passes see, by their number, and where a draw cannot be made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from monteclora.adapters.last_blocks import LastBlocks
from monteclora.errors import ConfigError
from monteclora.posterior import AdapterPosterior, Draw

__all__ = ["PosteriorSampler", "outside_transforms"]


class PosteriorSampler:
    """What eval-mode forward passes draw while sampling from the posterior is on.

    Args:
        seed: the stream of prediction draws.
        count: draws made at once; the batch is then the examples repeated ``count`` times.
        resample: whether every forward pass has new draws; else all have the first ones.
        first: number of the first draw.
        last: the blocks that are drawn; None is every layer.
    """

    def __init__(
        self, seed: int, count: int = 1, *, resample: bool = True, first: int = 0, last: LastBlocks | None = None
    ) -> None:
        self.seed = seed
        self.count = count
        self.resample = resample
        self.number = self.next = first
        self.last = last
        self.checked = False  # whether a batch was seen to be the examples repeated

    def advance(self) -> None:
        """The coming forward pass has new draws."""
        self.number, self.next = self.next, self.next + self.count

    def __call__(self, posterior: AdapterPosterior, count: int | None = None) -> Draw:
        """The draws of the coming forward pass, or its first ``count``."""
        drawn = None if self.last is None else self.last.drawn.get(posterior)
        with outside_transforms():
            return posterior.sample(self.seed, self.number, self.count if count is None else count, drawn)


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Raise ConfigError for a draw that is made inside a transform of ``torch.func``, or while a model is exported."""
    # torch.jit does not list it among what it exports, and torch.onnx still traces
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, unused-ignore]
        raise ConfigError(
            "a draw would become a constant of the model that is being exported or traced",
            "Export it in evaluation mode, which uses the mean, or write draws with monteclora.export_samples.",
        )
    try:
        yield
    except RuntimeError as error:
        # torch's own words: whether a transform is active has no public name
        if not any(word in str(error) for word in ("transform, ", "torch.func", "vmap")):
            raise
        raise ConfigError(
            "a draw cannot be made inside a transform of torch.func (grad, vmap, jvp)",
            "Transform the model in evaluation mode, which uses the mean, or take gradients with backward().",
        ) from error
