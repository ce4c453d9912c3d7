"""What training returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from monteclora.runs.recipe import Recipe
from monteclora.runs.run_folder import RunFolder

__all__ = ["RunResult", "learning_rate_found"]


def learning_rate_found(rate: float | None, range_test_steps: int, back_offs: int) -> str | None:
    """A run's learning rate and how it came to it, for people; None where the rate is the recipe's.

    Arguments as :class:`RunResult` has them.
    """
    found = [f"found by a range test of {range_test_steps} steps"] if range_test_steps else []
    times = "once" if back_offs == 1 else f"{back_offs} times"
    found += [f"halved {times} by going back"] if back_offs else []
    shown = "each member's own" if rate is None else f"{rate:g}"
    return ", ".join([shown, *found]) if found else None


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: where it is.
        recipe: what it trained.
        steps: optimiser steps of all phases.
        kept_step: the step whose weights it ended with.
        metrics: validation metrics of that step, by name; empty without validation rows.
        seconds: of training.
        peak_memory_bytes: of the GPU where there is one, else of the process.
        tokens: seen in training, without padding.
        trained_parameters: how many numbers were trained.
        skipped_steps: how many were not finite and changed nothing (``training.non_finite: skip``).
        learning_rate: the peak: of the recipe, or what a range test found (``training.learning_rate: auto``), halved
            each time the run went back; None for a run that an earlier version finished.
        range_test_steps: of that test; its seconds and tokens are counted in those of the run.
        back_offs: how often the run went back, and on at half the learning rate (``training.back_off``).
        temperature: by which the head was divided (``training.temperature``); None where it was not, and of an
            ensemble, whose members have one each.
        members: the folders of an ensemble's runs; empty for an ordinary run. An ensemble's metrics are its members'
            mean, its peak memory the largest, its learning rate the one that all have (None where each found another),
            and its other numbers are sums; each member has kept a step of its own.
    """

    folder: Path
    recipe: Recipe = field(repr=False)
    steps: int
    kept_step: int
    metrics: Mapping[str, float]
    seconds: float
    peak_memory_bytes: int
    tokens: int
    trained_parameters: int
    skipped_steps: int = 0
    learning_rate: float | None = None
    range_test_steps: int = 0
    back_offs: int = 0
    temperature: float | None = None
    members: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        shown = "".join(f", {name}={value:.4g}" for name, value in self.metrics.items())
        return f"RunResult({self.folder}, step {self.kept_step} of {self.steps}{shown})"

    @property
    def adapter(self) -> Path:
        """The trained adapter, as ``save_pretrained`` writes it."""
        return RunFolder(self.folder).adapter
