"""One draw for each forward pass, made before it starts (docs/method.md section 7).

A :class:`DrawScope` hooks the model from its outermost module down to the one that holds every adapted layer, so that
a draw is made whichever of them is called, once for the outermost call. Recomputation by activation checkpointing, in
which the layers run again inside the backward pass, sees the draw of the forward pass it repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from monteclora.posterior import AdapterPosterior, Draw, in_force
from monteclora.system.devices import process_index

__all__ = ["BoundCheckpoint", "DrawScope", "DrawSource", "PosteriorSampler", "holding"]


class DrawSource(Protocol):
    """Whoever knows which posteriors take part in the next forward pass."""

    def drawn_posteriors(self) -> Sequence[AdapterPosterior]:
        """Posteriors of the adapters that are active, enabled and not merged."""
        ...

    def is_trained(self, posterior: AdapterPosterior) -> bool:
        """Whether training forward passes draw from it."""
        ...

    def means(self, posterior: AdapterPosterior) -> Sequence[Tensor] | None:
        """Means of a posterior's layers, to be drawn with the noise; None where layers add their own."""
        ...


class PosteriorSampler:
    """What eval-mode forward passes draw while sampling from the posterior is on.

    Args:
        seed: the stream of prediction draws.
        count: draws made at once; the batch is then the examples repeated ``count`` times.
        resample: whether every forward pass has new draws; else all have the first ones.
        first: number of the first draw.
    """

    def __init__(self, seed: int, count: int = 1, *, resample: bool = True, first: int = 0) -> None:
        self.seed = seed
        self.count = count
        self.resample = resample
        self.next = first

    def __call__(self, posterior: AdapterPosterior) -> Draw:
        """The draw of the coming forward pass."""
        return posterior.sample(self.seed, self.next, self.count)


@contextmanager
def holding(posteriors: Sequence[AdapterPosterior], draws: Sequence[Draw | None]) -> Iterator[None]:
    """Repeat a forward pass inside the block: ``draws`` are the current ones."""
    before = [(posterior.current, posterior.repeating) for posterior in posteriors]
    for posterior, draw in zip(posteriors, draws, strict=True):
        posterior.current, posterior.repeating = draw, True
    try:
        yield
    finally:
        for posterior, state in zip(posteriors, before, strict=True):
            posterior.current, posterior.repeating = state


class BoundCheckpoint:
    """A checkpointing function that repeats a block under the draws of its forward pass."""

    def __init__(self, checkpoint: Callable[..., Any], source: DrawSource) -> None:
        self.checkpoint = checkpoint
        self.source = source

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``function`` with the draws that are current now."""
        if torch.compiler.is_compiling():
            # the draw is an input of the compiled graph, whose repetition reads the same input
            return self.checkpoint(function, *args, **kwargs)
        posteriors = list(self.source.drawn_posteriors())
        draws = [posterior.current for posterior in posteriors]

        def repeat(*inputs: Any, **keywords: Any) -> Any:
            with holding(posteriors, draws):
                return function(*inputs, **keywords)

        return self.checkpoint(repeat, *args, **kwargs)


def _batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """The first dimension of what the model is called with."""
    named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")]
    for value in [*named, *args, *kwargs.values()]:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


@contextmanager
def _outside_checkpoints() -> Iterator[None]:
    """Draw with a graph, and keep what it saves, though the model be called inside a checkpoint."""
    with (
        torch.set_grad_enabled(not torch.is_inference_mode_enabled()),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        yield


# what is going on in a context, by scope: threads that call one model at the same time do not meet
_levels: ContextVar[Mapping[DrawScope, int]] = ContextVar("levels", default=MappingProxyType({}))
_samplers: ContextVar[Mapping[DrawScope, PosteriorSampler]] = ContextVar("samplers", default=MappingProxyType({}))


class DrawScope:
    """Hooks that make the draws of a model's forward passes.

    Args:
        source: knows the posteriors.
    """

    def __init__(self, source: DrawSource) -> None:
        self.source = source
        self.held: int | None = None  # number of the draw that every training forward pass makes again
        self.shared = False  # whether every active adapter makes it, also one that is not trained
        self._traced: int | None = None
        self._hooked: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._blocks: list[nn.Module] = []

    def install(self, modules: Sequence[nn.Module], blocks: Sequence[nn.Module]) -> None:
        """Hook ``modules``, outermost first; ``blocks`` are those that may be checkpointed.

        Modules that are hooked already are left as they are. Each has a level, above those of the modules around it.
        """
        for module in modules:
            if not any(module is hooked for hooked in self._hooked):
                level = len(self._hooked)
                self._hooked.append(module)
                enter, leave = partial(self.enter, level), partial(self.leave, level)
                self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(leave, always_call=True))
        self._blocks = list(blocks)

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            function = getattr(block, "_gradient_checkpointing_func", None)
            if isinstance(function, BoundCheckpoint):
                block.__dict__["_gradient_checkpointing_func"] = function.checkpoint
        self._hooked, self._handles, self._blocks = [], [], []

    @property
    def _running(self) -> int | None:
        """The level of the outermost call that runs in this context; compiled code reads none and has its own."""
        return self._traced if torch.compiler.is_compiling() else _levels.get().get(self)

    @_running.setter
    def _running(self, level: int | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = level
        else:
            others = {scope: running for scope, running in _levels.get().items() if scope is not self}
            _levels.set(others if level is None else {**others, self: level})

    def enter(self, level: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Draw, if this is the outermost call and not a repetition inside a backward pass."""
        # no module runs inside itself or inside its parts: a call at this level or below it was interrupted
        running = self._running
        if running is None or level <= running:
            self._running = level
            self._draw(module.training, args, kwargs)

    def leave(self, level: int, module: nn.Module, args: Any, output: Any) -> None:
        """The call is over, by return or by exception."""
        if self._running == level:
            self._running = None

    @torch.compiler.disable
    def _draw(self, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        posteriors = self.source.drawn_posteriors()
        if training:
            self._bind_checkpoints()
            drawn = [posterior for posterior in posteriors if self.shared or self.source.is_trained(posterior)]
            if len(drawn) < len(posteriors):
                for posterior in posteriors:
                    posterior.current = None
            with _outside_checkpoints():
                for posterior in drawn:
                    if self.held is not None:
                        posterior.draws = self.held
                    posterior.draw(process_index(), _batch_size(args, kwargs), self.source.means(posterior))
            return
        sampler = _samplers.get().get(self)
        if sampler is not None and sampler.resample:
            for posterior in posteriors:
                posterior.predict_with(sampler(posterior))
            sampler.next += sampler.count

    def _bind_checkpoints(self) -> None:
        for block in self._blocks:
            function = getattr(block, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, BoundCheckpoint):
                block.__dict__["_gradient_checkpointing_func"] = BoundCheckpoint(function, self.source)

    @contextmanager
    def holding(
        self, posteriors: Sequence[AdapterPosterior], index: int | None = None, *, shared: bool = False
    ) -> Iterator[int]:
        """Let every training forward pass inside the block make the same draw.

        Args:
            posteriors: of the active adapters.
            index: number of the draw; None is the next one.
            shared: whether adapters that are not trained make it too, rather than stay at their mean.

        Yields:
            The number of the draw.
        """
        before = self.held, self.shared
        held = max((posterior.draws for posterior in posteriors), default=0) if index is None else index
        self.held, self.shared = held, shared
        try:
            yield held
        finally:
            self.held, self.shared = before

    @contextmanager
    def sampling(self, posteriors: Sequence[AdapterPosterior], sampler: PosteriorSampler) -> Iterator[None]:
        """Let eval-mode forward passes of this context draw with ``sampler`` inside the block."""
        token = _samplers.set({**_samplers.get(), self: sampler})
        before = [posterior.predictive for posterior in posteriors]
        try:
            with in_force.restored():
                for posterior in posteriors:
                    # where every forward pass draws, the first one's draw is not made here as well
                    posterior.predict_with(None if sampler.resample else sampler(posterior))
                yield
        finally:
            _samplers.reset(token)
            for posterior, draw in zip(posteriors, before, strict=True):
                posterior.mirror(draw)
