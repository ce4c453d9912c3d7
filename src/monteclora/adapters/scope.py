"""One draw for each forward pass, made before it starts (docs/method.md section 7).

A :class:`DrawScope` hooks every module that contains adapted layers, down to the blocks of the model, so that a draw is
made whichever of them is called, once for the outermost call. A layer that is reached in another way asks for its draw
itself. Recomputation by activation checkpointing, in which the layers run again inside the backward pass, sees the draw
of the forward pass it repeats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from monteclora.adapters import checkpointing
from monteclora.adapters.posterior_sampler import PosteriorSampler, outside_transforms
from monteclora.adapters.prefix import SharedPrefix
from monteclora.adapters.row_checks import AdaptedLayers, RowChecks, batch_size, probing
from monteclora.errors import ConfigError
from monteclora.posterior import AdapterPosterior, Draw, in_force
from monteclora.posterior.torch_private import in_backward
from monteclora.system.devices import process_index

__all__ = ["DrawScope", "DrawSource"]


class DrawSource(AdaptedLayers, Protocol):
    """Knows which posteriors take part in the next forward pass."""

    def drawn_posteriors(self) -> Sequence[AdapterPosterior]:
        """Posteriors of the adapters that are active, enabled and not merged."""
        ...

    def is_trainable(self, posterior: AdapterPosterior) -> bool:
        """Whether anything of its adapter is trainable."""
        ...

    def check_here(self, posterior: AdapterPosterior) -> None:
        """Raise ConfigError for an adapter of which anything is offloaded."""
        ...

    def means(self, posterior: AdapterPosterior) -> Sequence[Tensor] | None:
        """Means of a posterior's layers, to be drawn with the noise; None where layers add their own."""
        ...

    def hook_everything(self) -> None:
        """Install the scope on every module that contains an adapted layer."""
        ...


@contextmanager
def _outside_checkpoints() -> Iterator[None]:
    """Draw with a graph, and keep what it saves, though the model be called inside a checkpoint."""
    with (
        torch.set_grad_enabled(not torch.is_inference_mode_enabled()),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        yield


# the state of each context, by scope: threads that call one model at the same time do not meet
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
        self._hooked: list[nn.Module] = []
        self._within: tuple[frozenset[int], ...] = ()  # the numbers of the hooked modules inside each
        self._handles: list[RemovableHandle] = []
        self._blocks: list[nn.Module] = []
        self._everywhere = False  # whether every module around a layer that is known is hooked
        self._rows = RowChecks(source)
        self._prefix = SharedPrefix()

    def install(self, modules: Sequence[nn.Module], blocks: Sequence[nn.Module]) -> None:
        """Hook ``modules``, outermost first; ``blocks`` are those that may be checkpointed.

        Modules that are hooked already are left as they are.
        """
        self._blocks, self._everywhere = list(blocks), False
        self._rows.forget()
        self._prefix.forget()
        known = {id(module) for module in self._hooked}
        if all(id(module) in known for module in modules):
            return
        for module in modules:
            if id(module) not in known:
                known.add(id(module))
                number = len(self._hooked)
                self._hooked.append(module)
                # what calls a compiled model runs the outermost hooks by themselves, outside its graph
                enter = partial(self.enter if number else self.enter_uncompiled, number)
                leave = partial(self.leave if number else self.leave_uncompiled, number)
                self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(leave, always_call=True))
        numbers = {id(module): number for number, module in enumerate(self._hooked)}
        self._within = tuple(
            frozenset(numbers[id(part)] for part in module.modules() if part is not module and id(part) in numbers)
            for module in self._hooked
        )

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._prefix.remove()
        checkpointing.unbind(self._blocks)
        self._hooked, self._within, self._handles, self._blocks = [], (), [], []
        self._everywhere = False

    @property
    def _running(self) -> int | None:
        """The number of the outermost call that runs in this context."""
        return _levels.get().get(self)

    @_running.setter
    def _running(self, number: int | None) -> None:
        others = {scope: running for scope, running in _levels.get().items() if scope is not self}
        _levels.set(others if number is None else {**others, self: number})

    @property
    def samples(self) -> bool:
        """Whether evaluation-mode forward passes of this context draw."""
        return self in _samplers.get()

    def enter(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Draw, if this is the outermost call and not a repetition inside a backward pass.

        Not in compiled code, which would be another for every block: where nothing around it drew, its layers do.
        """
        if torch.compiler.is_compiling():
            return
        running = self._running
        # whatever is called before it returns is inside the outermost call; if it is not, that call was interrupted
        if running is None or number not in self._within[running]:
            self._running = number
            self._draw(number, args, kwargs)

    def leave(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        """The call is over, by return or by exception."""
        if torch.compiler.is_compiling():
            return
        if self._running == number:
            self._running = None
            self._prefix.end()
            sampler = _samplers.get().get(self)
            repeated = in_backward()
            for posterior in self.source.known_posteriors():
                posterior.drawn = posterior.repeating
                if not repeated:
                    posterior.awaits_draw = sampler is not None and sampler.resample

    @torch.compiler.disable
    def enter_uncompiled(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """:meth:`enter`, never part of a compiled graph."""
        self.enter(number, module, args, kwargs)

    @torch.compiler.disable
    def leave_uncompiled(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        """:meth:`leave`, never part of a compiled graph."""
        self.leave(number, module, args, output)

    @torch.compiler.disable
    def _draw(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward() or probing():
            return
        posteriors = self.source.drawn_posteriors()
        for posterior in posteriors:
            self.source.check_here(posterior)
        training = [self._in_training(posterior) for posterior in posteriors]
        if any(training):
            checkpointing.bind(self._blocks, self.source.drawn_posteriors)
            each = [posterior for posterior in posteriors if posterior.settings.noise == "per_example"]
            if each:
                self._rows.check_examples(self._hooked[number], args, kwargs, each)
            for posterior, trains in zip(posteriors, training, strict=True):
                if trains:
                    self._draw_for_training(posterior, batch_size(args, kwargs))
        sampler = _samplers.get().get(self)
        if sampler is not None and not all(training):
            self._draw_for_prediction(sampler, number, args, kwargs)

    def _in_training(self, posterior: AdapterPosterior) -> bool:
        """Whether any of a posterior's layers is in training mode: the modules around them may be in another."""
        return any(layer.training for layer in self.source.adapted_layers(posterior).values())

    def _draw_for_training(self, posterior: AdapterPosterior, batch_size: int | None) -> None:
        if torch.is_grad_enabled() and not posterior.trained:
            posterior.trained = self.source.is_trainable(posterior)
        if self._draws_in_training(posterior):
            if self.held is not None:
                posterior.draws = self.held
            with outside_transforms(), _outside_checkpoints():
                posterior.draw(process_index(), batch_size, self.source.means(posterior))
        else:
            posterior.current = None
        posterior.drawn = True

    def _draws_in_training(self, posterior: AdapterPosterior) -> bool:
        """Whether a training forward pass draws from a posterior, rather than sees its mean.

        It does if anything of the adapter is trainable and it has been trained: it was active when it was made, or has
        been in a forward pass with gradients since. The copy of a policy that serves as its reference is made inactive,
        and switched on, trainable, where there are none.
        """
        trained = posterior.trained or torch.is_grad_enabled()
        return self.shared or (trained and self.source.is_trainable(posterior))

    def _draw_for_prediction(
        self, sampler: PosteriorSampler, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        posteriors = self.source.drawn_posteriors()
        if sampler.count > 1 and (sampler.resample or not sampler.checked):
            self._rows.check_repeated(sampler.count, args, kwargs)
            sampler.checked = True
        if sampler.count > 1:
            self._rows.check_draws(self._hooked[number], args, kwargs, sampler.count, posteriors)
        if sampler.resample:
            sampler.advance()
        if sampler.count > 1 and sampler.last is not None and sampler.last.first > 0:
            self._prefix.begin(self._hooked[number], args, kwargs, sampler.last, sampler.count, posteriors, sampler)
        if sampler.resample:
            for posterior in self.source.known_posteriors():
                if posterior in posteriors:
                    posterior.predict_with(sampler(posterior))
                    posterior.awaits_draw = False
                elif posterior.predictive is not None:
                    posterior.predict_with(None)

    def keeping_prefix(self) -> AbstractContextManager[None]:
        """Passes of this context inside the block are over the same rows: blocks below the noise run in the first."""
        return self._prefix.keeping()

    @torch.compiler.disable
    def draw_late(self, posterior: AdapterPosterior) -> None:
        """A layer in training mode runs, and its posterior was not drawn in the pass in progress, if there is one.

        Its adapter may have been made active in some layers alone; then it is drawn for the rest of the pass. Or the
        layer is reached without any of the hooked modules around it: then it has a draw of its own, and from the next
        call on every module around an adapted layer is hooked.
        """
        if in_backward() or probing() or not posterior.enabled:
            return
        running = self._running is not None
        if posterior.settings.noise == "per_example" and self._draws_in_training(posterior):
            if running:
                raise ConfigError(
                    "noise='per_example' met an adapter that is active in some layers alone",
                    "Make it active in the model with model.set_adapter(name), or use noise='shared'.",
                )
            raise ConfigError(
                "noise='per_example' met an adapted layer outside a forward pass of the model",
                "Call the model, or one of its blocks, or use noise='shared'.",
            )
        self._draw_for_training(posterior, None)
        posterior.drawn = running
        if not running and not self._everywhere:
            self.source.hook_everything()
            self._everywhere = True

    @torch.compiler.disable(reason="a compiled block was called outside its model under posterior_sampling")
    def refuse_alone(self) -> None:
        """Raises ConfigError: a compiled layer predicts, and no module around it was there to draw."""
        if not probing():
            raise ConfigError(
                "posterior_sampling met a compiled block outside a forward pass of its model, where nothing draws",
                "Call the model, compile the whole of it, or sample with resample=False.",
            )

    def predictive(self, posterior: AdapterPosterior) -> Draw | None:
        """The draw that a layer in evaluation mode sees; made here if its adapter is active in some rows alone."""
        draw = posterior.predictive
        if draw is None:
            sampler = _samplers.get().get(self)
            if sampler is not None and posterior.enabled and not probing():
                draw = sampler(posterior)
                posterior.predict_with(draw)
        return draw

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
        everyone = self.source.known_posteriors()
        before = [(posterior.predictive, posterior.awaits_draw) for posterior in everyone]
        try:
            with in_force.restored():
                for posterior in everyone:
                    in_force.put(posterior, None)
                    posterior.awaits_draw = sampler.resample
                for posterior in posteriors:
                    # where every forward pass draws, the first one's draw is not made here as well
                    posterior.predict_with(None if sampler.resample else sampler(posterior))
                yield
        finally:
            _samplers.reset(token)
            for posterior, (draw, awaits) in zip(everyone, before, strict=True):
                posterior.mirror(draw)
                posterior.awaits_draw = awaits
