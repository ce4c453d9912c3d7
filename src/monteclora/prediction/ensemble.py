"""Deep ensembles (Lakshminarayanan et al. 2017): the draws are the predictions of separately trained models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from monteclora.errors import ConfigError

__all__ = ["ENSEMBLE", "Ensemble", "Members"]

ENSEMBLE = "ensemble"

_current: ContextVar[int] = ContextVar("member", default=0)


class Members(nn.Module):
    """Models of one architecture under one forward: the first, or inside a draw of :class:`Ensemble` the one drawn.

    Args:
        members: two models or more that take the same inputs and give outputs of the same shapes.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the member in force gives for these inputs."""
        return self.members[_current.get()](*args, **kwargs)

    @property
    def generation_config(self) -> Any:
        """How language models write, the first member's."""
        return self.members[0].generation_config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the member in force writes."""
        member: Any = self.members[_current.get()]
        return member.generate(*args, **kwargs)


@dataclass(frozen=True)
class Ensemble:
    """Draw s is the prediction of member s at its mean; see :class:`monteclora.prediction.sampler.Sampler`.

    Attributes:
        num_samples: how many members draw, the first ones.
        seed: taken as every sampler takes one; the members' own training seeds are what makes them differ.
    """

    num_samples: int
    seed: int = 0
    name: str = ENSEMBLE

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError for a single model, and for fewer members than draws."""
        count = len(model.members) if isinstance(model, Members) else 1
        if not isinstance(model, Members) or count < self.num_samples:
            raise ConfigError(
                f"the sampler {ENSEMBLE} needs several runs, one a draw, and was given {count}",
                f"Use `monteclora evaluate RUN RUN ... --sampler {ENSEMBLE}`.",
            )

    @contextmanager
    def draw(self, model: nn.Module, number: int) -> Iterator[None]:
        """Forward passes in the block are those of member ``number``.

        Raises:
            ConfigError: the model is a single one.
        """
        self.check(model)
        token = _current.set(number)
        try:
            yield
        finally:
            _current.reset(token)
