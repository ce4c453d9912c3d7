"""The prediction draws in force: a property of the calling context, not of the model.

Threads and tasks that predict with one model at the same time each see their own draws, and a context that asked for
none sees the mean. A thread that is started inside a block of draws begins in a context of its own, and so at the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from monteclora.posterior.draws import Draw
    from monteclora.posterior.posterior import AdapterPosterior

__all__ = ["draw_of", "put", "restored"]

_draws: ContextVar[Mapping[AdapterPosterior, Draw | None]] = ContextVar("draws", default=MappingProxyType({}))


def draw_of(posterior: AdapterPosterior) -> Draw | None:
    """The draw that evaluation forward passes of this context see; None for the mean."""
    return _draws.get().get(posterior)


def put(posterior: AdapterPosterior, draw: Draw | None) -> None:
    """Let the following forward passes of this context see ``draw``, until the innermost :func:`restored` ends."""
    _draws.set({**_draws.get(), posterior: draw})


@contextmanager
def restored() -> Iterator[None]:
    """After the block the draws of this context are those before it."""
    token = _draws.set(_draws.get())
    try:
        yield
    finally:
        _draws.reset(token)
