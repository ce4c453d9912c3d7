"""``training.learning_rate: auto``: a learning-rate range test (Smith 2017, arXiv 1506.01186) before the run.

The rate rises exponentially from step to step, on the batches that the run begins with. The loss of some other rows,
the same after every second step, falls, and rises again when the rate is too high; the run takes a fraction of the rate
in the middle of the valley, the less the more steps it has (docs/training.md says how the fraction was chosen). The
batches' own losses are not asked: on a task that is learned late, the labels that small batches happen to hold hide the
valley. The model that was tested is thrown away: the run begins with a new one, so that nothing of the test can be left
in it, whatever the method keeps.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
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
from monteclora.training.batches import Batches
from monteclora.training.divergence import Part
from monteclora.training.interruption import TrainingInterrupted, stop_on_signals
from monteclora.training.loop import Loop
from monteclora.training.plans import Phase, phases_of, plan_of
from monteclora.training.probe import Probe
from monteclora.training.reporting import Reporting
from monteclora.training.state import TrainingState

__all__ = [
    "MOST_PROBED_ROWS",
    "MOST_STEPS",
    "NOMINAL",
    "VERSION",
    "RangeTest",
    "chosen_rate",
    "fraction",
    "range_test",
    "recorded",
]

logger = logging.getLogger(__name__)

EVENT = "range_test"
LOWEST, HIGHEST = 1e-6, 10.0
STEPS_PER_DECADE = 12
MOST_STEPS = round(math.log10(HIGHEST / LOWEST) * STEPS_PER_DECADE) + 1
PROBE_ROWS, PROBE_EVERY = 64, 2  # with half as many, the rate that is found depends on which rows they are
MOST_PROBED_ROWS = PROBE_ROWS * (1 + MOST_STEPS // PROBE_EVERY)  # forward passes
VERSION = 3  # of what decides the rate: a study does not take an outcome of another one
NOMINAL = 1e-3  # where a rate is asked for and none has been found yet, as in a dry run
LEAST, MOST = 1 / 16, 1 / 2  # of the rate in the middle of the valley
_FACTOR = 4.0  # of that fraction: it is this over the root of the number of steps
_BOTTOM = 0.1  # of the fall: losses so much above the lowest still belong to the valley
_CLEAR = 0.01  # of the first loss: a smaller fall is none, a smaller rise neither


@dataclass(frozen=True)
class RangeTest:
    """The outcome of a range test.

    Attributes:
        learning_rate: the rate to train at.
        steps: of the test.
        tokens: trained on in it, without padding.
        seconds: it took, without making the model again.
        initial_loss: the task's loss over the rows that it measures, in nats, before the first step.
        rates: of the steps after which it measured.
        losses: after each of these.
    """

    learning_rate: float
    steps: int
    tokens: int
    seconds: float
    initial_loss: float
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
    (first, *_) = phases_of(recipe, len(data.train), LOWEST)
    loop = _loop(recipe, run, data, model, console, first)
    curve = _Curve()
    try:
        loop.reporting.start(loop.state)
        with stop_on_signals() as loop.interruption, named_memory(loop.batches):
            probe = Probe(loop, _probed_rows(loop.batches), recipe.training.eval_batch_size)
            curve.start = probe()
            _raise_rate(loop, probe, curve)
    except _NotFinite:
        pass
    finally:
        loop.reporting.close()
    if not curve.losses:
        raise DivergenceError(
            f"training.learning_rate auto: the loss is not finite at the lowest rate that is tried, {LOWEST:g}",
            "Look at the data, or set training.precision to fp32.",
        )
    found, falls = chosen_rate(curve.start, curve.rates, curve.losses, fraction(first.steps))
    if not falls:
        logger.warning(
            "no learning rate lets the loss fall within the range test: taking %g, below where it rises", found
        )
    state = loop.state
    steps, tokens = state.step, state.tokens
    loop.accelerator.free_memory()
    seconds = time.perf_counter() - began
    return RangeTest(found, steps, tokens, seconds, curve.start, tuple(curve.rates), tuple(curve.losses))


def fraction(steps: int) -> float:
    """Which part of the rate in the middle of the valley suits a run of so many optimiser steps.

    It falls with the root of their number, as the best linearly falling step sizes of a subgradient method do (Zamani
    and Glineur 2023, arXiv 2307.11134), within bounds: beyond them nothing was measured.
    """
    return min(max(_FACTOR / math.sqrt(steps), LEAST), MOST)


def chosen_rate(start: float, rates: Sequence[float], losses: Sequence[float], part: float) -> tuple[float, bool]:
    """The rate to train at, of two significant digits; and whether the loss fell at any.

    It is a part of the geometric mean of the lowest and the highest rate in the valley. Where no rate lets the loss
    fall, it is that part of the last one before it rises.

    Args:
        start: the loss before the first step.
        rates: in ascending order.
        losses: after a step at each of them.
        part: of the rate in the middle, see :func:`fraction`.
    """
    lowest, clear = min(losses), _CLEAR * abs(start)
    falls = start - lowest > clear
    if falls:
        bottom = lowest + _BOTTOM * (start - lowest)
        valley = [rate for rate, loss in zip(rates, losses, strict=True) if loss <= bottom]
        middle = math.sqrt(valley[0] * valley[-1])
    else:
        harmless = len(list(takewhile(lambda loss: loss <= start + clear, losses)))
        middle = rates[max(harmless - 1, 0)]
    return float(f"{part * middle:.1e}"), falls


@dataclass
class _Curve:
    """The loss at the start, and after steps at rising rates."""

    start: float = math.nan
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def is_lost(self) -> bool:
        """Whether the loss is now above where it began by as much as it had fallen, and by a tenth."""
        if not self.losses:
            return False
        fallen = self.start - min(self.losses)
        return self.losses[-1] > self.start + max(fallen, 0.1 * abs(self.start))


def _probed_rows(batches: Batches) -> list[int]:
    """Rows that the test does not train on, and where there are too few, any rows; their labels are those of the data.

    Every k-th one in the order of the labels: how often each label is among them decides how far the loss can fall at
    first, when the model learns no more than that.
    """
    order = batches.order(0)
    unseen = order[MOST_STEPS * batches.rows_per_step :]
    pool = unseen if len(unseen) >= PROBE_ROWS else order
    shuffled = torch.randperm(len(pool), generator=torch.Generator().manual_seed(batches.seed)).tolist()
    rows = [pool[place] for place in shuffled]
    if isinstance(batches.dataset[0]["labels"], int | float):  # one of a row, rather than several, or one of each token
        labels = dict(zip(rows, batches.dataset.select(rows)["labels"], strict=True))
        rows.sort(key=labels.__getitem__)
    count = min(PROBE_ROWS, len(rows))
    return [rows[(2 * number + 1) * len(rows) // (2 * count)] for number in range(count)]


def _raise_rate(loop: Loop, probe: Probe, curve: _Curve) -> None:
    """Step at rising rates, and measure, until the loss has lost what it had gained."""
    while loop.state.step < MOST_STEPS:
        epoch, first = divmod(loop.state.step, loop.batches.steps_per_epoch)
        for batches in loop.batches.steps(epoch, first):
            taken = loop.scheduler.last_epoch
            loop.step(batches)
            # fp16 skips steps to find its scale
            if loop.scheduler.last_epoch > taken and loop.scheduler.last_epoch % PROBE_EVERY == 0:
                loss = probe()
                if not math.isfinite(loss):
                    return
                curve.rates.append(LOWEST * _growth(taken))
                curve.losses.append(loss)
            loop.reporting.step(loop.state)
            if loop.interruption.agreed(loop.accelerator.device):
                raise TrainingInterrupted("stopped in the learning-rate range test: the same command begins it again")
            if loop.state.step >= MOST_STEPS or curve.is_lost:
                return


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


def _loop(recipe: Recipe, run: RunFolder, data: PreparedData, model: nn.Module, console: Console, first: Phase) -> Loop:
    """A loop over the run's first batches, at the lowest rate of each parameter group."""
    recipe = dataclasses.replace(recipe, report_to=[])
    # to the method it is the beginning of a run of the usual length: rank pruning, say, is for later
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
