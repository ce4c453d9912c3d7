"""What predictions cost: calls of the model and seconds, of each sampler apart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from monteclora.prediction.sampler import MEAN, Sampler

__all__ = ["Meter", "Metered", "metered"]


@dataclass
class Meter:
    """Counts while :func:`metered` is on.

    Attributes:
        calls: of the model.
        drawn_calls: those of them under a draw.
        drawn_seconds: under draws.
        seconds: of the whole block; 0 until it ends.
    """

    calls: int = 0
    drawn_calls: int = 0
    drawn_seconds: float = 0.0
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def costs(self, sampler: str | None) -> dict[str, dict[str, float]]:
        """``forward_passes`` and ``seconds`` of the mean and, where there is one, of the sampler.

        The mean's seconds include tokenising and metrics.
        """
        found = {
            MEAN.name: {
                "forward_passes": self.calls - self.drawn_calls,
                "seconds": round(self.seconds - self.drawn_seconds, 3),
            }
        }
        if sampler is not None:
            found[sampler] = {"forward_passes": self.drawn_calls, "seconds": round(self.drawn_seconds, 3)}
        return found


@contextmanager
def metered(model: nn.Module) -> Iterator[Meter]:
    """Count the calls of ``model`` inside the block."""
    meter = Meter()

    def count(*_: object) -> None:
        meter.calls += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield meter
    finally:
        handle.remove()
        meter.seconds = time.perf_counter() - meter.started


@dataclass(frozen=True)
class Metered:
    """A sampler whose draws are counted; see :class:`monteclora.prediction.sampler.Sampler`."""

    sampler: Sampler
    meter: Meter

    @property
    def name(self) -> str:
        """The sampler's."""
        return self.sampler.name

    @property
    def num_samples(self) -> int:
        """The sampler's."""
        return self.sampler.num_samples

    @contextmanager
    def draw(self, model: nn.Module, number: int) -> Iterator[None]:
        """As the sampler's, counted."""
        started, calls = time.perf_counter(), self.meter.calls
        try:
            with self.sampler.draw(model, number):
                yield
        finally:
            self.meter.drawn_seconds += time.perf_counter() - started
            self.meter.drawn_calls += self.meter.calls - calls
