"""How a model predicts: at its point estimate, or under draws of something in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

from torch import nn

__all__ = ["MEAN", "Batched", "Checked", "Mean", "Sampler", "SharesPasses", "sharing"]


class Sampler(Protocol):
    """Where the S draws of a prediction come from.

    Draw s depends on the sampler alone: it is the same for every batch, and the draws of two calling contexts that use
    one model at the same time do not meet.
    """

    @property
    def name(self) -> str:
        """As the command line and result files write it."""
        ...

    @property
    def num_samples(self) -> int:
        """S, at least 1."""
        ...

    def draw(self, model: nn.Module, number: int) -> AbstractContextManager[None]:
        """Forward passes of ``model`` inside the block predict under draw ``number``, from 0 to S - 1."""
        ...


@runtime_checkable
class Batched(Protocol):
    """A sampler whose draws can share one forward pass."""

    def draws(self, model: nn.Module, first: int, count: int) -> AbstractContextManager[None]:
        """Forward passes in the block are given their rows ``count`` times over: the copies are under the draws
        ``first``, ``first + 1``, ...

        A pass raises RowOrderError where a layer of the model mixes rows.
        """
        ...


class SharesPasses(Batched, Sampler, Protocol):
    """A sampler whose draws are cheaper together than one at a time."""

    @property
    def shares_passes(self) -> bool:
        """Whether they are, as it is set."""
        ...

    @property
    def keeps_shared(self) -> bool:
        """Whether passes over the same rows can keep what draws share; else draws of one pass alone share it."""
        ...

    def keeping(self, model: nn.Module) -> AbstractContextManager[None]:
        """A block whose passes are over the same rows: what their draws share is computed in the first of them."""
        ...


def sharing(sampler: Sampler) -> SharesPasses | None:
    """The sampler, if its draws are cheaper together than one at a time."""
    return cast(SharesPasses, sampler) if getattr(sampler, "shares_passes", False) else None


@runtime_checkable
class Checked(Protocol):
    """A sampler that not every model can be given to."""

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError for a model that has nothing to draw, before anything is computed."""
        ...


@dataclass(frozen=True)
class Mean:
    """The point estimate, of a posterior its mean: one forward pass."""

    name: str = "mean"
    num_samples: int = 1

    def draw(self, model: nn.Module, number: int) -> AbstractContextManager[None]:
        """Nothing to prepare: outside any draw a model predicts at its mean."""
        return nullcontext()


MEAN = Mean()
