"""What a run is to do: its phases, their steps, and how a step is divided into passes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from monteclora.errors import ConfigError
from monteclora.methods.base import PhaseName, Plan
from monteclora.runs.recipe import Recipe, TrainingSpec
from monteclora.system.devices import process_count

__all__ = ["Phase", "batches", "phases_of", "plan_of", "steps_per_epoch", "warmup_steps"]


@dataclass(frozen=True)
class Phase:
    """A part of a run with an optimiser of its own.

    Attributes:
        name: what is trained.
        steps: most optimiser steps.
        learning_rate: its peak.
    """

    name: PhaseName
    steps: int
    learning_rate: float

    @property
    def validates(self) -> bool:
        """Whether validation can tell anything: it uses the mean, which the posterior's own phase keeps."""
        return self.name != "posterior"


def steps_per_epoch(spec: TrainingSpec, rows: int) -> int:
    """Optimiser steps that go through ``rows`` once; the last one may have fewer rows."""
    return math.ceil(rows / spec.batch_size)


def batches(spec: TrainingSpec) -> tuple[int, int]:
    """Rows per forward pass of one process, and passes per step.

    Raises:
        ConfigError: the processes cannot share a batch evenly.
    """
    count = process_count()
    micro = spec.micro_batch_size or max(spec.batch_size // count, 1)
    if spec.batch_size % (micro * count):
        raise ConfigError(
            f"training.batch_size {spec.batch_size} cannot be divided among {count} processes of {micro} rows",
            "Choose a batch_size that is a multiple of micro_batch_size times the number of processes.",
        )
    return micro, spec.batch_size // (micro * count)


def phases_of(recipe: Recipe, rows: int, learning_rate: float) -> list[Phase]:
    """The phases of a recipe that trains on ``rows`` rows.

    Args:
        recipe: it.
        rows: of the training split.
        learning_rate: the peak: the recipe's, or what was found where that is ``auto``.
    """
    spec = recipe.training
    first = _steps(spec, rows, spec.epochs, spec.max_steps)
    if spec.mode == "cooperative":
        return [Phase("cooperative", first, learning_rate)]
    second = _steps(spec, rows, spec.post_hoc.epochs, spec.post_hoc.max_steps)
    posterior = Phase("posterior", second, learning_rate * spec.post_hoc.learning_rate_factor)
    if spec.post_hoc.adapter is not None:
        return [posterior]
    return [Phase("adapter", first, learning_rate), posterior]


def warmup_steps(spec: TrainingSpec, steps: int) -> int:
    """Those of a phase of ``steps`` over which the learning rate rises."""
    return math.ceil(steps * spec.warmup_ratio)


def plan_of(recipe: Recipe, phase: Phase, rows: int) -> Plan:
    """What a method knows of a phase that trains on ``rows`` rows."""
    return Plan(
        options=recipe.method,
        phase=phase.name,
        steps=phase.steps,
        rows=rows,
        learning_rate=phase.learning_rate,
        weight_decay=recipe.training.weight_decay,
        seed=recipe.seed,
    )


def _steps(spec: TrainingSpec, rows: int, epochs: float, most: int | None) -> int:
    steps = math.ceil(epochs * steps_per_epoch(spec, rows))
    return steps if most is None else min(steps, most)
