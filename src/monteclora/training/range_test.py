"""``training.learning_rate: auto``: a learning-rate range test (Smith 2017, arXiv 1506.01186) before the run.

The rate rises exponentially from step to step, on the batches that the run begins with. The smoothed loss falls, and
rises again when the rate is too high; the run takes a fixed fraction of the rate where it is lowest (docs/training.md
says how the fraction was chosen). The model that was tested is thrown away: the run begins with a new one, so that
nothing of the test can be left in it, whatever the method keeps.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import set_seed

from monteclora.errors import DivergenceError
from monteclora.methods import get_method
from monteclora.runs.prepare import PreparedData
from monteclora.runs.recipe import Recipe
from monteclora.runs.run_folder import RunFolder
from monteclora.training.assembly import accelerator_of, assemble, named_memory
from monteclora.training.divergence import Part
from monteclora.training.interruption import TrainingInterrupted, stop_on_signals
from monteclora.training.loop import Loop
from monteclora.training.plans import phases_of, plan_of
from monteclora.training.reporting import Reporting
from monteclora.training.state import TrainingState

__all__ = ["MOST_STEPS", "NOMINAL", "RangeTest", "chosen_rate", "range_test", "recorded"]

logger = logging.getLogger(__name__)

EVENT = "range_test"
LOWEST, HIGHEST = 1e-6, 10.0
STEPS_PER_DECADE = 12
MOST_STEPS = round(math.log10(HIGHEST / LOWEST) * STEPS_PER_DECADE) + 1
FRACTION = 0.25  # of the rate where the loss is lowest
NOMINAL = 1e-3  # where a rate is asked for and none has been found yet, as in a dry run
_WITHIN, _CLEAR = 3.0, 5.0  # standard errors within which two smoothed losses are the same, and by which one is lower
_HALF_WIDTH = 4  # of the window that smooths the loss, in steps: a third of a decade
_WINDOW = 2 * _HALF_WIDTH + 1


@dataclass(frozen=True)
class RangeTest:
    """The outcome of a range test.

    Attributes:
        learning_rate: the rate to train at.
        steps: of the test.
        tokens: seen in it, without padding.
        seconds: it took, without making the model again.
        rates: of its steps whose loss was finite.
        losses: the task's loss at each of these, in nats, before the step.
    """

    learning_rate: float
    steps: int
    tokens: int
    seconds: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]

    def event(self, phase: str) -> dict[str, Any]:
        """As a line of ``metrics.jsonl``."""
        facts = dataclasses.asdict(self)
        return {"event": EVENT, "phase": phase, "step": 0, **facts, "test_steps": facts.pop("steps")}


def recorded(run: RunFolder) -> float | None:
    """The rate that the run's own test found; None where it has made none."""
    found = [event for event in run.metrics.read() if event["event"] == EVENT]
    return float(found[-1]["learning_rate"]) if found else None


def range_test(recipe: Recipe, run: RunFolder, data: PreparedData, model: nn.Module, console: Console) -> RangeTest:
    """Find the learning rate of a run.

    Deterministic, and on every process the same. Nothing is written.

    Args:
        recipe, run, data: what is to be trained.
        model: as the run would begin with it; of no use afterwards.
        console: for people.

    Raises:
        DivergenceError: the loss is not finite from the start.
        TrainingInterrupted: when that was asked for; the same command begins the test again.
        ConfigError: the recipe asks for something this machine or version cannot do.
    """
    began = time.perf_counter()
    loop = _loop(recipe, run, data, model, console)
    rates: list[float] = []
    losses: list[float] = []
    try:
        loop.reporting.start(loop.state)
        with stop_on_signals() as loop.interruption, named_memory(loop.batches):
            _raise_rate(loop, rates, losses)
    except _NotFinite:
        pass
    finally:
        loop.reporting.close()
    if not losses:
        raise DivergenceError(
            f"training.learning_rate auto: the loss is not finite at the lowest rate that is tried, {LOWEST:g}",
            "Look at the data, or set training.precision to fp32.",
        )
    found, falls = chosen_rate(rates, losses)
    if not falls:
        logger.warning(
            "no learning rate lets the loss fall within the range test: taking %g, below where it rises", found
        )
    state = loop.state
    steps, tokens = state.step, state.tokens
    loop.accelerator.free_memory()
    seconds = time.perf_counter() - began
    return RangeTest(found, steps, tokens, seconds, tuple(rates), tuple(losses))


def chosen_rate(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, bool]:
    """The rate to train at, of two significant digits; and whether the loss fell at any.

    It is a fraction of the highest rate at which the smoothed loss is at its lowest, within its noise. Where no rate
    lets it fall, that is the last one before it rises.

    Args:
        rates: in ascending order.
        losses: at each of them.
    """
    smooth = _smoothed(losses)
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    error = _error_of_a_mean(losses, smooth, max(lowest + 1, 3 * _WINDOW))
    last = max(at for at, value in enumerate(smooth) if value <= smooth[lowest] + _WITHIN * error)
    return float(f"{FRACTION * rates[last]:.1e}"), _mean(losses[:_WINDOW]) - smooth[lowest] > _CLEAR * error


def _error_of_a_mean(losses: Sequence[float], smooth: Sequence[float], count: int) -> float:
    """The standard error of the smoothed loss, from the first ``count`` losses: what follows is a trend, not noise."""
    residuals = [loss - mean for loss, mean in zip(losses[:count], smooth, strict=False)]
    weights = _weights(range(-_HALF_WIDTH, _HALF_WIDTH + 1))
    total, squares = sum(weights), sum(w * w for w in weights)
    # each loss is in the mean that it is measured from
    share = 1 - 2 * max(weights) / total + squares / total**2
    return math.sqrt(_mean([r * r for r in residuals]) / share * squares) / total


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _weights(distances: Iterable[int]) -> list[int]:
    return [_HALF_WIDTH + 1 - abs(distance) for distance in distances]


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Triangular means over a window around each step: single batches' noise goes, the minimum stays in its place."""
    smooth = []
    for at in range(len(losses)):
        near = range(max(at - _HALF_WIDTH, 0), min(at + _HALF_WIDTH + 1, len(losses)))
        weights = _weights(other - at for other in near)
        smooth.append(sum(w * losses[other] for w, other in zip(weights, near, strict=True)) / sum(weights))
    return smooth


def _raise_rate(loop: Loop, rates: list[float], losses: list[float]) -> None:
    """Step at rising rates, adding each with its loss, until the loss has lost what it had gained."""
    while loop.state.step < MOST_STEPS:
        epoch, first = divmod(loop.state.step, loop.batches.steps_per_epoch)
        for batches in loop.batches.steps(epoch, first):
            before, taken = loop.state.loss, loop.scheduler.last_epoch
            loop.step(batches)
            if loop.scheduler.last_epoch > taken:  # fp16 skips steps to find its scale
                rates.append(LOWEST * _growth(taken))
                losses.append(loop.state.loss - before)
            loop.reporting.step(loop.state)
            if loop.interruption.agreed(loop.accelerator.device):
                raise TrainingInterrupted("stopped in the learning-rate range test: the same command begins it again")
            if loop.state.step >= MOST_STEPS or _is_lost(losses):
                return


def _is_lost(losses: Sequence[float]) -> bool:
    """Whether the loss is well above where it began, by its mean over a window."""
    if len(losses) < 2 * _WINDOW:
        return False
    start, now, best = _mean(losses[:_WINDOW]), _mean(losses[-_WINDOW:]), min(_smoothed(losses))
    return now > start + max(start - best, 0.1 * abs(start))


def _growth(step: int) -> float:
    return float(10 ** (step / STEPS_PER_DECADE))


class _NotFinite(Exception):  # noqa: N818 - no error: the end of the test
    pass


class _Watch:
    """Ends the test, and saves nothing."""

    def met(self, state: TrainingState, part: Part, indices: Sequence[int]) -> None:
        raise _NotFinite

    def save(self, loop: Loop) -> None:
        raise AssertionError("a range test saves nothing")

    def restore_generators(self) -> None:
        raise AssertionError("a range test does not resume")


def _loop(recipe: Recipe, run: RunFolder, data: PreparedData, model: nn.Module, console: Console) -> Loop:
    """A loop over the run's first batches, at the lowest rate of each parameter group."""
    recipe = dataclasses.replace(recipe, report_to=[])
    # to the method it is the beginning of a run of the usual length: rank pruning, say, is for later
    (first, *_) = phases_of(recipe, len(data.train), LOWEST)
    phase = dataclasses.replace(first, steps=max(first.steps, 10 * MOST_STEPS))
    plan = plan_of(recipe, phase, len(data.train))
    method = get_method(recipe.method.name)
    method.begin_phase(model, plan)
    set_seed(recipe.seed)
    accelerator = accelerator_of(recipe, run)
    title = f"{recipe.name} (learning-rate range test)"
    reporting = Reporting(
        run.metrics, accelerator, console, phase=phase.name, title=title, first_step=0, steps=MOST_STEPS
    )
    watch = _Watch()
    loop = assemble(recipe, phase, plan, data, model, method, accelerator, watch, watch, reporting)
    loop.scheduler = LambdaLR(loop.optimizer, _growth)
    return loop
