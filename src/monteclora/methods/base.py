"""What a fine-tuning method is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from monteclora.data.kinds import Kind
from monteclora.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

__all__ = ["Added", "Method", "MethodOptions", "PhaseName", "Plan", "TaskKind"]

TaskKind = Kind
PhaseName = Literal["cooperative", "adapter", "posterior"]
"""``cooperative`` trains everything; ``adapter`` all but a posterior; ``posterior`` the posterior alone."""

# as transformers' Trainer: neither biases nor the weights of norms
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@dataclass(frozen=True)
class MethodOptions:
    """The ``method`` section of a recipe; every method has its own subclass, with its own fields.

    ``renamed`` gives the present name of each field that earlier versions called otherwise, ``described_by`` classes
    whose docstrings say what fields are that no base class has.
    """

    renamed: ClassVar[Mapping[str, str]] = {}
    described_by: ClassVar[tuple[type, ...]] = ()

    name: str

    def resolved(self) -> Self:
        """The same options with every default that depends on another option written out."""
        return self


@dataclass(frozen=True)
class Added:
    """What a method adds to the task's loss, once per optimiser step.

    Attributes:
        loss: a scalar, differentiable.
        numbers: scalars to log, by name.
    """

    loss: Tensor
    numbers: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a phase of training is to be.

    Attributes:
        options: the ``method`` section of the recipe.
        phase: what is trained.
        steps: most optimiser steps of the phase.
        rows: of the training split.
        learning_rate: its peak.
        weight_decay: of the parameters that have any.
        seed: of the run.
    """

    options: Any
    phase: PhaseName
    steps: int
    rows: int
    learning_rate: float
    weight_decay: float
    seed: int


class Method:
    """A way to fine-tune a model. A method overrides what it does differently from plain fine-tuning with AdamW.

    Attributes:
        name: as recipes write it.
        description: one line for ``monteclora list methods``.
        options: its fields in the ``method`` section of a recipe.
        has_posterior: whether it has a posterior to train post hoc and to draw predictions from.
        takes_laplace: whether its trained weights are few and a point estimate, so that a Laplace approximation can be
            fitted around them.
    """

    name: str
    description: str
    options: type[MethodOptions]
    has_posterior: bool = False
    takes_laplace: bool = False

    # -- how it is trained --------------------------------------------------------------------------------------------

    def wrap(self, model: PreTrainedModel, options: Any, task_kind: TaskKind, seed: int) -> nn.Module:
        """Put the method on a base model, in place; what has a gradient afterwards is trained.

        What it initialises, and the state in which it leaves the global generators, depend on the seed alone and are
        the same for every method that trains the same weights: runs of one seed are paired.

        Raises:
            ConfigError: an option does not fit the model.
        """
        raise NotImplementedError

    def start_from(self, model: PreTrainedModel, adapter: Path, options: Any, seed: int) -> nn.Module:
        """Put a plain LoRA adapter from elsewhere on a base model, in place, with a posterior that is to be trained.

        Args:
            model: the base model.
            adapter: the folder.
            options: the ``method`` section of the recipe; LoRA's options are the adapter's own.
            seed: of the noise.

        Raises:
            CheckpointError: a file of the adapter is missing or damaged, or does not fit the model.
            ConfigError: the method has no posterior, or the adapter is a variant that cannot be drawn.
        """
        raise ConfigError(f"the method {self.name} has no posterior to train on an adapter", "Choose monteclora.")

    def begin_phase(self, model: nn.Module, plan: Plan) -> None:
        """Prepare a phase. Methods without a posterior have the phase ``cooperative`` alone.

        Raises:
            ConfigError: an option does not fit the plan.
        """

    def parameter_groups(self, model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
        """The trained parameters in groups of an optimiser: those with weight decay, then those without."""
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        norms = _names_in_norms(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (decayed if self.decays(name) and name not in norms else others).append(parameter)
        return [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to the parameter of that name."""
        return _NOT_DECAYED.search(name.lower()) is None

    def optimizer(self, groups: list[dict[str, Any]], plan: Plan) -> Optimizer:
        """AdamW with the defaults of transformers' Trainer."""
        import torch

        return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def gradient_context(self, optimizer: Any) -> AbstractContextManager[None]:
        """Around all forward and backward passes of a step and the clipping of its gradient.

        Args:
            optimizer: what :meth:`optimizer` made.
        """
        return nullcontext()

    def added_loss(self, model: nn.Module) -> Added | None:
        """What is added to the task's loss, asked for after the forward pass of each batch; None for nothing."""
        return None

    def kept_whole(self, model: nn.Module) -> list[nn.Module]:
        """Parts of a sharded model that every process keeps whole: they are used outside of its blocks' forward."""
        return []

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Called after step ``step`` (from 1) of ``steps`` changed the weights, while gradients are still there."""

    def diverged(self, model: nn.Module) -> str | None:
        """What training has destroyed though every number is finite, in words; None for nothing.

        Asked for before a checkpoint is written, which is then not written.
        """
        return None

    # -- what it costs ------------------------------------------------------------------------------------------------

    def virtual_tokens(self, options: Any) -> int:
        """Positions of the model that the method itself takes in every row."""
        return 0

    def extra_memory(self, model: nn.Module, options: Any) -> int:
        """Bytes that training keeps besides weights, gradients, AdamW's moments and activations, from the shapes."""
        return 0

    # -- on disk ------------------------------------------------------------------------------------------------------

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained into an empty folder, without pickle."""
        raise NotImplementedError

    def load(self, model: nn.Module, folder: Path) -> None:
        """Put what :meth:`save` wrote into a model that :meth:`wrap` made; what is trainable stays so.

        Raises:
            CheckpointError: a file is missing or damaged, or it does not fit the model.
            UnsafeCodeError: the weights are a pickle.
        """
        raise NotImplementedError

    def merge(self, model: nn.Module) -> nn.Module:
        """An ordinary model with the trained weights in it; ``model`` is left as it is.

        Raises:
            ConfigError: the method's change cannot be merged into the weights.
        """
        raise ConfigError(f"the method {self.name} cannot be merged", "Use the adapter as it is.")


def _names_in_norms(model: nn.Module) -> set[str]:
    from torch import nn

    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    return {f"{name}.{parameter}" for name, module in norms for parameter, _ in module.named_parameters()}
