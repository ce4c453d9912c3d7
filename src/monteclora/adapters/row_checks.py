"""Whether several draws, or noise of each example's own, can share the forward pass that is about to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

from monteclora.adapters.rows import RowOrder, batch_tensor, batch_tensors, row_order
from monteclora.errors import ConfigError
from monteclora.posterior import AdapterPosterior, in_force

__all__ = [
    "AdaptedLayers",
    "RowChecks",
    "RowOrderError",
    "batch_size",
    "call_kind",
    "probe",
    "probing",
    "without_adapters",
]

_probing: ContextVar[bool] = ContextVar("probing", default=False)
_frozen_alone: ContextVar[bool] = ContextVar("frozen_alone", default=False)


class RowOrderError(ConfigError):
    """Several draws were asked of one forward pass, of a model whose layers cannot tell them apart."""


class AdaptedLayers(Protocol):
    """Knows which layers belong to which posterior."""

    def adapted_layers(self, posterior: AdapterPosterior) -> Mapping[str, nn.Module]:
        """A posterior's layers by name."""
        ...

    def known_posteriors(self) -> Sequence[AdapterPosterior]:
        """Those of all adapters, active or not."""
        ...


@contextmanager
def probe(*, adapted: bool = True) -> Iterator[None]:
    """In the block this context runs a model only to find something out.

    Args:
        adapted: whether adapters add their mean, or the frozen layers are run alone. Where rows lie is a matter of the
            architecture, and adapters that training has ruined may let rows look alike.
    """
    token, alone = _probing.set(True), _frozen_alone.set(not adapted)
    try:
        yield
    finally:
        _frozen_alone.reset(alone)
        _probing.reset(token)


def call_kind(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], posteriors: Sequence[AdapterPosterior]
) -> tuple[Any, ...]:
    """What two calls have in common for which the same is found out."""
    given = tuple(sorted(name for name, value in kwargs.items() if value is not None))
    return id(module), len(args), given, tuple(id(posterior) for posterior in posteriors)


def probing() -> bool:
    """Whether this context runs a model only to find something out: nothing is drawn then."""
    return _probing.get()


def without_adapters() -> bool:
    """Whether this context runs the frozen layers alone."""
    return _frozen_alone.get()


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """The first dimension of what the model is called with; None where it is called without a tensor."""
    tensor = batch_tensor(args, kwargs)
    return None if tensor is None else tensor.shape[0]


class RowChecks:
    """Checks of the calls of one model, which remember what they found for each kind of call.

    Args:
        source: knows the posteriors and their layers.
    """

    def __init__(self, source: AdaptedLayers) -> None:
        self.source = source
        self._order: dict[Any, RowOrder] = {}

    def forget(self) -> None:
        """The layers have changed: determine the order again."""
        self._order.clear()

    def check_repeated(self, count: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check that a batch is its first rows ``count`` times over: else row i would silently get another row's draw.

        Raises:
            ConfigError: it is not.
        """
        for batch in batch_tensors(args, kwargs):
            parts = batch.detach().unflatten(0, (count, -1)) if batch.shape[0] % count == 0 else None
            if parts is None or not torch.equal(parts, parts[:1].expand_as(parts)):
                raise ConfigError(
                    f"{count} draws at once met a batch of {batch.shape[0]} rows that is not its first rows {count} "
                    "times over",
                    "Repeat the batch along its first dimension, or draw one at a time with num_samples=1.",
                )

    def check_draws(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        count: int,
        posteriors: Sequence[AdapterPosterior],
    ) -> None:
        """Check that every layer of ``module`` can tell ``count`` draws apart.

        Raises:
            RowOrderError: one cannot.
        """
        disorder = self._disorder(module, args, kwargs, count, posteriors)
        if disorder is not None:
            raise RowOrderError(
                f"{count} draws at once cannot be distinguished in layer {disorder}",
                "Draw one at a time with num_samples=1, as monteclora.predict does for such models.",
            )

    def check_examples(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        posteriors: Sequence[AdapterPosterior],
    ) -> None:
        """Check that every layer of ``module`` can tell the examples of the batch apart.

        Raises:
            ConfigError: one cannot.
        """
        batch = batch_size(args, kwargs)
        if batch is None or batch < 2:
            return
        disorder = self._disorder(module, args, kwargs, batch, posteriors)
        if disorder is not None:
            raise ConfigError(
                f"noise='per_example' cannot tell the {batch} examples of a batch apart in layer {disorder}",
                "Use noise='shared', or leave that layer out of target_modules.",
            )

    def _disorder(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        groups: int,
        posteriors: Sequence[AdapterPosterior],
    ) -> str | None:
        """What :func:`~monteclora.adapters.rows.row_order` finds, for each kind of call until every layer ran once."""
        kind = call_kind(module, args, kwargs, posteriors)
        known = self._order.get(kind, RowOrder())
        if not known.settled:
            layers = {k: v for posterior in posteriors for k, v in self.source.adapted_layers(posterior).items()}
            with probe(adapted=False), in_force.restored():
                for posterior in self.source.known_posteriors():
                    in_force.put(posterior, None)
                known = row_order(module, args, kwargs, layers, groups, known)
            self._order[kind] = known
        return known.disorder
