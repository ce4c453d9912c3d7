"""The training loop of a phase, on one page, for every method.

A step: its batches forward and backward, the gradient clipped, the optimiser stepped, the learning rate moved on; then,
where they are due, logging, validation and a checkpoint. accelerate moves, shards and synchronises; torch does the
rest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from monteclora.methods.base import Method
from monteclora.tasks.measures import Measures
from monteclora.training.batches import Batch, Batches
from monteclora.training.class_prior import ClassPrior
from monteclora.training.divergence import Part
from monteclora.training.interruption import Interruption
from monteclora.training.reporting import Reporting
from monteclora.training.state import TrainingState
from monteclora.training.validation import Interrupted, Validation
from monteclora.training.watch import LossWatch, WentWrong

__all__ = ["Intervals", "Loop", "NonFinite", "Saver"]


class Saver(Protocol):
    """Writes checkpoints, and takes up the generators of the one that is resumed from."""

    def save(self, loop: Loop) -> None:
        """Write a checkpoint of the step, the whole of it or nothing."""
        ...

    def restore_generators(self) -> None:
        """Put the generators into the checkpoint's state."""
        ...


class NonFinite(Protocol):
    """What happens at a step that is not finite."""

    def met(self, state: TrainingState, part: Part, indices: Sequence[int]) -> None:
        """Take note of such a step, or raise what ends the loop.

        Args:
            state: where the phase stands, before the step.
            part: what is not finite.
            indices: of this process's training rows in the step.
        """
        ...


@dataclass(frozen=True)
class Intervals:
    """After how many steps what happens; the last step has all of it.

    Attributes:
        log, evaluate, save: steps.
        best_metric: whose best step is kept, by name; None for none.
        greater_is_better: its direction.
        patience: evaluations in a row without a better one after which training stops; None for never.
    """

    log: int
    evaluate: int
    save: int
    best_metric: str | None = None
    greater_is_better: bool = False
    patience: int | None = None


def _plain(norm: Any) -> Tensor:
    """A norm over sharded gradients is a sum that no process has yet."""
    return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)


class _Pass(NamedTuple):
    """What one batch adds to its step: its shares of the task's loss and of the objective, and numbers to log."""

    task: Tensor
    objective: Tensor
    numbers: Mapping[str, Tensor]


@dataclass
class Loop:
    """Trains one phase.

    Attributes:
        accelerator: of this process.
        method: adds its loss, and is called after steps.
        model: as accelerate prepared it, all of it in training mode.
        optimizer, scheduler: of the phase.
        scaler: of the loss, for fp16; switched off otherwise.
        precision: makes the autocast context of a forward pass.
        measures: the task's loss.
        batches: of the training split.
        validation: of the validation split; None for none.
        steps: at most.
        clip: scales the gradients of parameters down to a norm, and gives the one they had.
        max_grad_norm: that norm; infinite for never.
        intervals: when what happens.
        saver: writes checkpoints.
        non_finite: what happens at a step that is not finite.
        reporting: tells of the phase.
        interruption: asks to stop.
        watch: judges the loss of a phase that may go back; None where it may not.
        prior: of the classes, for what is judged by the loss; None for other tasks, or where nothing is.
        kept_whole: parameters of a sharded model whose gradients nobody else averages over the processes.
        state: where the phase stands.
        resumed: whether it starts from a checkpoint.
        interrupted: whether it was asked to stop and did.
    """

    accelerator: Accelerator
    method: Method
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    precision: Callable[[], AbstractContextManager[Any]]
    measures: Measures
    batches: Batches
    validation: Validation | None
    steps: int
    clip: Callable[[Sequence[nn.Parameter], float], Tensor]
    max_grad_norm: float
    intervals: Intervals
    saver: Saver
    non_finite: NonFinite
    reporting: Reporting
    interruption: Interruption
    watch: LossWatch | None = None
    prior: ClassPrior | None = None
    kept_whole: Sequence[nn.Parameter] = ()
    state: TrainingState = field(default_factory=TrainingState)
    resumed: bool = False
    interrupted: bool = False
    # of the last step: by how much its labels make its loss higher than that of others
    luck: float = 0.0
    # what the method reported of the last finite step; on the device until it is logged or saved
    _numbers: Mapping[str, Tensor] | None = None
    _started: float = 0.0

    def run(self) -> None:
        """Train to the end of the phase, to an early stop or to an interruption; see ``state`` and ``interrupted``.

        Raises:
            WentWrong: the phase had better go back.
        """
        self._started = time.perf_counter() - self.state.seconds
        self.reporting.start(self.state)
        if self.state.evaluation_pending:  # of the checkpoint that is resumed from, in whose place the new one comes
            self.saver.restore_generators()
            self._finish_step(evaluate=True, save=True)
        if self.watch is not None and not self.resumed:
            self.state.good_step = self.state.step
            self.saver.save(self)
        while not self.finished:
            epoch, first = divmod(self.state.step, self.batches.steps_per_epoch)
            for batches in self._epoch(epoch, first):
                self.step(batches)
                self._after_step()
                if self.finished:
                    break

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do, now."""
        return self.state.step >= self.steps or self.state.stopped_early or self.interrupted

    @property
    def seconds(self) -> float:
        """Of training, until now."""
        return time.perf_counter() - self._started

    @property
    def at_the_end(self) -> bool:
        """Whether the phase is complete."""
        return (self.state.step >= self.steps or self.state.stopped_early) and not self.state.evaluation_pending

    def _epoch(self, epoch: int, first: int) -> Iterator[list[Batch]]:
        """The rest of an epoch; on resuming, the generators are those that the uninterrupted run had here."""
        if self.resumed and not first:
            self.saver.restore_generators()
        found = self.batches.steps(epoch, first)
        if self.resumed and first:
            self.saver.restore_generators()
        self.resumed = False
        return found

    # looked up once: a search through the modules in every step takes as long as the optimiser
    @cached_property
    def _unwrapped(self) -> nn.Module:
        """The model as the method made it."""
        found: nn.Module = self.accelerator.unwrap_model(self.model)
        return found

    @cached_property
    def _trained(self) -> list[nn.Parameter]:
        """What the phase trains."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(self, batches: list[Batch]) -> None:
        """One optimiser step; ``batches`` are this process's."""
        if not self.model.training:  # after a validation; setting every module takes 1 % of a small model's step
            self.model.train()
        device = self.accelerator.device
        items, tokens = self._count(batches)
        inputs = [{name: value.to(device) for name, value in batch.inputs.items()} for batch in batches]
        # as with after_step: a step passes through the base class, and its file, for no method that leaves it as it is
        own_context = type(self.method).gradient_context is not Method.gradient_context
        with self.method.gradient_context(self.optimizer) if own_context else nullcontext():
            passes = self._passes(inputs, items)
            if self.scaler.is_enabled():
                self.scaler.unscale_(self.optimizer)
            norm = self.clip(self._trained, self.max_grad_norm)
        finite = self._is_finite(batches, passes, _plain(norm))
        if not finite:
            self._forget_gradients()  # without them the optimiser skips every weight
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else fp16 skipped this step to find its scale
            if finite and type(self.method).after_step is not Method.after_step:
                self.method.after_step(self._unwrapped, self.state.step + 1, self.steps)
            self.state.learning_rate = float(self.optimizer.param_groups[0]["lr"])
            self.scheduler.step()
        self._forget_gradients()
        self.state.step += 1
        self.state.tokens += tokens

    def _forget_gradients(self) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def _count(self, batches: list[Batch]) -> tuple[Tensor, int]:
        """Items of the loss, an int64 scalar on the device, and tokens of the step, over all processes.

        Counted before the batches are moved, so that nothing waits for the device.
        """
        items = sum(int(self.measures.count(batch.inputs["labels"])) for batch in batches)
        tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in batches if batch.rows)
        excess = 0.0 if self.prior is None else sum(self.prior.excess(batch.inputs["labels"]) for batch in batches)
        counts = torch.tensor([items, tokens], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
            items, tokens = counts.tolist()
            if self.prior is not None:
                excess = float(self.accelerator.reduce(torch.tensor(excess, device=counts.device), reduction="sum"))
        self.luck = excess / max(items, 1)
        return counts[0], tokens

    def _passes(self, inputs: Sequence[Mapping[str, Any]], items: Tensor) -> list[_Pass]:
        """Forward and backward of every batch of the step; the processes meet at the last one."""
        passes = []
        for number, batch in enumerate(inputs, start=1):
            last = number == len(inputs)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                passes.append(self._backward(batch, items, len(inputs)))
        for parameter in self.kept_whole:
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return passes

    def _backward(self, batch: Mapping[str, Any], items: Tensor, count: int) -> _Pass:
        """Forward and backward of one of ``count`` batches."""
        with self.precision():
            loss = self.measures.loss(self.model, batch, items)
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        task = loss.detach().float()
        added = self.method.added_loss(self._unwrapped)
        if added is not None:
            loss = loss + added.loss.to(loss.device) / count
        self.scaler.scale(loss).backward()
        return _Pass(task, loss.detach().float(), {} if added is None else added.numbers)

    def _is_finite(self, batches: list[Batch], passes: list[_Pass], norm: Tensor) -> bool:
        """Whether the step may be taken; if not, it is counted, or the run ends. One transfer from the device."""
        state, objectives = self.state, torch.stack([each.objective for each in passes])
        agreed = torch.stack([torch.stack([each.task for each in passes]).sum(), objectives.sum(), norm.to(objectives)])
        if self.accelerator.num_processes > 1:
            agreed = self.accelerator.reduce(agreed, reduction="mean")
        task, objective, size, *own = torch.cat([agreed, objectives]).tolist()
        part: Part | None = None
        culprits = batches
        if not math.isfinite(objective):
            part = "regulariser" if math.isfinite(task) else "loss"
            culprits = [batch for batch, value in zip(batches, own, strict=True) if not math.isfinite(value)]
        elif not math.isfinite(size) and self.scaler.get_scale() <= 1:
            part = "gradient"  # fp16 finds its loss scale by overflowing, until there is nothing left to halve
        if part is not None:
            self.non_finite.met(state, part, [row for batch in culprits for row in batch.rows])
            return False
        state.loss += task
        state.objective += objective
        state.finite_steps += 1
        state.skipped_in_a_row = 0
        if self.watch is not None:
            self.watch.see(state.watch, task, self.luck)
        state.grad_norm, self._numbers = size, passes[-1].numbers
        return True

    # -- what follows a step ------------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        state, intervals = self.state, self.intervals
        self.reporting.step(state)
        if self.watch is not None and state.good_step is not None:
            reason = self.watch.verdict(state.watch, state.step)
            if reason is not None:
                raise WentWrong(reason)
        last = state.step >= self.steps
        if last or state.step % intervals.log == 0:
            self._log()
        self.interrupted = self.interruption.agreed(self.accelerator.device)
        self._finish_step(evaluate=last or state.step % intervals.evaluate == 0)

    def _finish_step(self, *, evaluate: bool, save: bool = False) -> None:
        """Validate if that is due, and save if that, an end or a new best asks for it."""
        state = self.state
        best = self._evaluate() if evaluate and self.validation is not None else False
        good = evaluate and self.watch is not None and self.watch.is_good(state.watch)
        if good and not state.evaluation_pending:
            state.good_step, state.good_best = state.step, state.best_step
        due = state.step >= self.steps or state.step % self.intervals.save == 0
        if save or due or best or good or state.stopped_early or self.interrupted:
            self._settle()
            self.saver.save(self)

    def _settle(self) -> None:
        """Bring into the state what is kept outside of it between logs and checkpoints."""
        self.state.seconds = self.seconds
        if self._numbers is not None:
            self.state.numbers = {name: value.item() for name, value in self._numbers.items()}
            self._numbers = None

    def _log(self) -> None:
        state = self.state
        if state.finite_steps:  # nothing to tell where every step was skipped
            self._settle()
            values = {"loss": state.loss / state.finite_steps}
            if state.numbers:
                values |= {"objective": state.objective / state.finite_steps, **state.numbers}
            values |= {"learning_rate": state.learning_rate, "grad_norm": state.grad_norm}
            self.reporting.train(state, self._epochs, values)
        state.loss = state.objective = 0.0
        state.finite_steps, state.logged_step = 0, state.step

    def _evaluate(self) -> bool:
        """Validate, log, and take note of the best; gives whether this step is it."""
        assert self.validation is not None
        state, intervals, begin = self.state, self.intervals, time.perf_counter()
        try:
            model, device = self.model, self.accelerator.device
            metrics = self.validation(model, device, self.precision(), lambda: self.interruption.requested)
        except Interrupted:
            state.evaluation_pending = self.interrupted = True
            return False
        state.evaluation_pending = False
        self.reporting.evaluation(state, self._epochs, metrics, time.perf_counter() - begin)
        if intervals.best_metric is None:
            return False
        best = state.improves(metrics[intervals.best_metric], greater_is_better=intervals.greater_is_better)
        # what has learned nothing yet is not stopped but judged: it may go back
        waits = self.watch is not None and self.watch.idles(state.watch)
        state.stopped_early = intervals.patience is not None and state.worse >= intervals.patience and not waits
        return best

    @property
    def _epochs(self) -> float:
        """Passes over the rows so far; a step of fewer rows counts as one."""
        return self.state.step / self.batches.steps_per_epoch
