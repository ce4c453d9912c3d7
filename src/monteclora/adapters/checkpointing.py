"""Activation checkpointing: a block that is recomputed in the backward pass sees the draw of its forward pass.

torch recomputes whatever function it was given, so that function brings its draw along. Blocks of transformers keep
theirs in an attribute; :func:`bind` puts a :class:`BoundCheckpoint` around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from monteclora.adapters.transformers_private import checkpoint_function, set_checkpoint_function
from monteclora.posterior import AdapterPosterior, Draw

__all__ = ["BoundCheckpoint", "bind", "unbind"]


@contextmanager
def _repeating(posteriors: Sequence[AdapterPosterior], draws: Sequence[Draw | None]) -> Iterator[None]:
    """Repeat a forward pass inside the block: ``draws`` are the current ones."""
    before = [(posterior.current, posterior.repeating, posterior.drawn) for posterior in posteriors]
    for posterior, draw in zip(posteriors, draws, strict=True):
        posterior.current, posterior.repeating, posterior.drawn = draw, True, True
    try:
        yield
    finally:
        for posterior, state in zip(posteriors, before, strict=True):
            posterior.current, posterior.repeating, posterior.drawn = state


class BoundCheckpoint:
    """A checkpointing function that recomputes a block under the draws of its forward pass.

    Args:
        checkpoint: the function that it stands in for, such as ``torch.utils.checkpoint.checkpoint``.
        drawn: gives the posteriors that take part in a forward pass.
    """

    def __init__(self, checkpoint: Callable[..., Any], drawn: Callable[[], Sequence[AdapterPosterior]]) -> None:
        self.checkpoint = checkpoint
        self.drawn = drawn

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``function`` with the draws that are current now."""
        if torch.compiler.is_compiling():
            # the draw is an input of the compiled graph, and the recomputation reads the same input
            return self.checkpoint(function, *args, **kwargs)
        posteriors = list(self.drawn())
        draws = [posterior.current for posterior in posteriors]

        def repeat(*inputs: Any, **keywords: Any) -> Any:
            with _repeating(posteriors, draws):
                return function(*inputs, **keywords)

        return self.checkpoint(repeat, *args, **kwargs)


def bind(blocks: Iterable[nn.Module], drawn: Callable[[], Sequence[AdapterPosterior]]) -> None:
    """Put a :class:`BoundCheckpoint` around the checkpointing function of every block that has one."""
    for block in blocks:
        function = checkpoint_function(block)
        if function is not None and not isinstance(function, BoundCheckpoint):
            set_checkpoint_function(block, BoundCheckpoint(function, drawn))


def unbind(blocks: Iterable[nn.Module]) -> None:
    """Undo :func:`bind`."""
    for block in blocks:
        function = checkpoint_function(block)
        if isinstance(function, BoundCheckpoint):
            set_checkpoint_function(block, function.checkpoint)
