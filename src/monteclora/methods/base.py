"""What a fine-tuning method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["Method", "MethodOptions", "TaskKind"]

TaskKind = Literal["classification", "causal_lm"]


@dataclass(frozen=True)
class MethodOptions:
    """The ``method`` section of a recipe; every method has its own subclass, with its own fields.

    ``renamed`` gives the present name of each field that earlier versions called otherwise.
    """

    renamed: ClassVar[Mapping[str, str]] = {}

    name: str

    def resolved(self) -> Self:
        """The same options with every default that depends on another option written out."""
        return self


@dataclass(frozen=True)
class Method:
    """A way to fine-tune a model.

    Attributes:
        name: as recipes write it.
        description: one line for ``monteclora list methods``.
        options: its fields in the ``method`` section of a recipe.
        wrap: ``(model, options, task_kind, seed) -> PeftModel`` puts the method's adapter on a base model, in
            place. What it initialises, and the state it leaves the global generators in, depend on the seed alone,
            and are the same for every method that trains the same weights: runs of one seed are paired.
        has_posterior: whether its adapters are drawn from a posterior, which post-hoc training and posterior
            prediction need.
    """

    name: str
    description: str
    options: type[MethodOptions]
    wrap: Callable[[PreTrainedModel, Any, TaskKind, int], PeftModel]
    has_posterior: bool = False
