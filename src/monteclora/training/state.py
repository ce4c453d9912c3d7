"""Where the training of a phase stands."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

__all__ = ["TrainingState"]


_LATER = frozenset(("back_offs", "good_step", "good_best", "watch"))  # which the first checkpoints do not have


@dataclass
class TrainingState:
    """The numbers that a checkpoint holds beside weights, optimiser and generators. Steps are those of the phase.

    Attributes:
        step: optimiser steps taken.
        tokens: seen in training, over all processes, without padding.
        best_value: the best value so far of the recipe's ``best_metric``; None before the first.
        best_step: the step that had it.
        worse: evaluations since then.
        stopped_early: whether the patience for them was used up.
        evaluation_pending: whether the evaluation after ``step`` is still to be made.
        logged_step: the last step that was logged.
        loss, objective: sums over the finite steps since then, of the task's loss and of what is minimised, nats.
        finite_steps: how many these are.
        grad_norm, learning_rate: of the last finite step, before clipping and before the schedule moved on.
        numbers: what the method reported of that step, by name.
        skipped, skipped_in_a_row: steps that were not finite, and those of them since the last finite one.
        seconds: of training.
        back_offs: how often the phase went back, and on at half the learning rate.
        good_step: the step whose checkpoint it would go back to now; None where there is none.
        good_best: ``best_step`` at that step.
        watch: what is known of the loss, see :class:`~monteclora.training.watch.LossWatch`.
    """

    step: int = 0
    tokens: int = 0
    best_value: float | None = None
    best_step: int | None = None
    worse: int = 0
    stopped_early: bool = False
    evaluation_pending: bool = False
    logged_step: int = 0
    loss: float = 0.0
    objective: float = 0.0
    finite_steps: int = 0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    back_offs: int = 0
    good_step: int | None = None
    good_best: int | None = None
    watch: dict[str, float] = field(default_factory=dict)

    def to_tree(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Self:
        """What :meth:`to_tree` gave, in this version or an earlier one."""
        names = [each.name for each in fields(cls) if each.name in tree or each.name not in _LATER]
        return cls(**{name: tree[name] for name in names})

    def improves(self, value: float, *, greater_is_better: bool) -> bool:
        """Take note of a validation value of this step; whether it is the best so far."""
        best = (-math.inf if greater_is_better else math.inf) if self.best_value is None else self.best_value
        better = value > best if greater_is_better else value < best  # what is not a number is never the best
        if better:
            self.best_value, self.best_step, self.worse = value, self.step, 0
        else:
            self.worse += 1
        return better
