"""What predictions cost: calls of the model and seconds, of each sampler apart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from torch import nn

from monteclora.prediction.sampler import MEAN, Batched, Sampler, sharing

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
    _open: int = 0
    _since: float = 0.0

    def count(self) -> None:
        """Count a call of the model."""
        self.calls += 1
        self.drawn_calls += self._open > 0

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """What happens in the block happens under a draw; where such blocks overlap it counts once."""
        if not self._open:
            self._since = time.perf_counter()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self.drawn_seconds += time.perf_counter() - self._since

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

    handle = model.register_forward_pre_hook(lambda *_: meter.count())
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

    @classmethod
    def of(cls, sampler: Sampler, meter: Meter) -> Metered:
        """The sampler, counted; its draws can share a forward pass if they could before."""
        return _MeteredTogether(sampler, meter) if isinstance(sampler, Batched) else Metered(sampler, meter)

    @property
    def name(self) -> str:
        """The sampler's."""
        return self.sampler.name

    @property
    def num_samples(self) -> int:
        """The sampler's."""
        return self.sampler.num_samples

    def draw(self, model: nn.Module, number: int) -> AbstractContextManager[None]:
        """As the sampler's, counted."""
        return self._counted(self.sampler.draw(model, number))

    @contextmanager
    def _counted(self, draws: AbstractContextManager[None]) -> Iterator[None]:
        with self.meter.drawing(), draws:
            yield


@dataclass(frozen=True)
class _MeteredTogether(Metered):
    """See :class:`monteclora.prediction.sampler.SharesPasses`."""

    @property
    def shares_passes(self) -> bool:
        """The sampler's."""
        return sharing(self.sampler) is not None

    @property
    def keeps_shared(self) -> bool:
        """The sampler's."""
        shared = sharing(self.sampler)
        return shared is not None and shared.keeps_shared

    def keeping(self, model: nn.Module) -> AbstractContextManager[None]:
        """The sampler's."""
        shared = sharing(self.sampler)
        return nullcontext() if shared is None else shared.keeping(model)

    def draws(self, model: nn.Module, first: int, count: int) -> AbstractContextManager[None]:
        """As the sampler's, counted: a call for several draws is one."""
        assert isinstance(self.sampler, Batched)
        return self._counted(self.sampler.draws(model, first, count))
