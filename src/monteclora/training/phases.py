"""The phases of a run, and how one of them is trained."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from rich.console import Console
from torch import nn
from transformers import get_scheduler, set_seed

from monteclora.errors import ConfigError
from monteclora.methods import Method, get_method
from monteclora.methods.base import PhaseName, Plan
from monteclora.metrics.registry import METRICS
from monteclora.runs.manifest import Checkpoint
from monteclora.runs.prepare import PreparedData
from monteclora.runs.recipe import Recipe, TrainingSpec, recipe_sha256
from monteclora.runs.run_folder import RunFolder
from monteclora.system.devices import process_count, process_index
from monteclora.training import sharding
from monteclora.training.batches import Batches
from monteclora.training.checkpoint import Checkpoints, restore
from monteclora.training.divergence import NonFiniteSteps
from monteclora.training.interruption import Interruption, TrainingInterrupted, stop_on_signals
from monteclora.training.loop import Intervals, Loop
from monteclora.training.reporting import Reporting
from monteclora.training.validation import Validation

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Outcome", "Phase", "batches", "phases_of", "plan_of", "steps_per_epoch", "train_phase"]

_STOPPING = "\nstopping: this step is finished and saved first; asked again, it stops at once\n"


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


@dataclass(frozen=True)
class Outcome:
    """What a phase came to; steps are counted over all phases.

    Attributes:
        step: the last one.
        kept_step: the one whose weights are to be kept.
        tokens: it saw, without padding.
        seconds: it took.
        skipped_steps: how many were not finite, and changed nothing.
    """

    step: int
    kept_step: int
    tokens: int
    seconds: float
    skipped_steps: int


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


def phases_of(recipe: Recipe, rows: int) -> list[Phase]:
    """The phases of a recipe that trains on ``rows`` rows."""
    spec = recipe.training
    first = _steps(spec, rows, spec.epochs, spec.max_steps)
    if spec.mode == "cooperative":
        return [Phase("cooperative", first, spec.learning_rate)]
    second = _steps(spec, rows, spec.post_hoc.epochs, spec.post_hoc.max_steps)
    rate = spec.learning_rate * spec.post_hoc.learning_rate_factor
    return [Phase("adapter", first, spec.learning_rate), Phase("posterior", second, rate)]


def plan_of(recipe: Recipe, phase: Phase, rows: int) -> Plan:
    """What a method is told of a phase that trains on ``rows`` rows."""
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


def train_phase(
    recipe: Recipe,
    phase: Phase,
    run: RunFolder,
    data: PreparedData,
    model: nn.Module,
    *,
    first_step: int,
    trained: frozenset[str],
    resume: Checkpoint | None,
    console: Console,
) -> Outcome:
    """Train one phase, from its start or from one of its checkpoints; ``model`` ends with the weights of the last step.

    Args:
        recipe, phase, run, data, model: what is trained, on what, and where it is kept.
        first_step: steps of the phases before.
        trained: names of the parameters that any phase of the run trains.
        resume: a checkpoint of this phase; None to start it.
        console: for people.

    Raises:
        TrainingInterrupted: after saving, when that was asked for.
        DivergenceError: the loss or a gradient is not finite.
        CheckpointError: the checkpoint does not fit, or the disk is full.
        ConfigError: the recipe asks for something this machine or version cannot do.
    """
    method = get_method(recipe.method.name)
    plan = plan_of(recipe, phase, len(data.train))
    method.begin_phase(model, plan)
    if resume is not None:
        method.load(model, resume.path)
    set_seed(recipe.seed)
    accelerator = _accelerator(recipe, run)
    saver = Checkpoints(
        folder=run.checkpoints,
        keep=recipe.training.keep_checkpoints,
        recipe_sha256=recipe_sha256(recipe),
        phase=phase.name,
        first_step=first_step,
        trained=trained,
        resumed_from=None if resume is None else resume.path,
    )
    title = recipe.name if phase.name == "cooperative" else f"{recipe.name} ({phase.name})"
    reporting = Reporting(
        run.metrics, accelerator, console, phase=phase.name, title=title, first_step=first_step, steps=phase.steps
    )
    loop = _loop(recipe, phase, plan, run, data, model, method, accelerator, saver, reporting)
    if resume is not None:
        restore(loop, resume.path)
    _run(loop, console)
    if loop.interrupted:
        total = first_step + loop.state.step
        raise TrainingInterrupted(f"{run.path} is saved at step {total}: the same command resumes it")
    state = loop.state
    kept = state.step if state.best_step is None else state.best_step
    return Outcome(first_step + state.step, first_step + kept, state.tokens, state.seconds, state.skipped)


def _run(loop: Loop, console: Console) -> None:
    """Train to the end, to a signal or to an error, and close what tells of it."""
    try:
        with stop_on_signals("" if console.quiet else _STOPPING) as loop.interruption, _named_memory(loop.batches):
            loop.run()
    finally:
        loop.reporting.close()
        for tracker in loop.accelerator.trackers:  # end_training() would also part the processes, whose run goes on
            tracker.finish()


def _loop(
    recipe: Recipe,
    phase: Phase,
    plan: Plan,
    run: RunFolder,
    data: PreparedData,
    model: nn.Module,
    method: Method,
    accelerator: Accelerator,
    saver: Checkpoints,
    reporting: Reporting,
) -> Loop:
    spec = recipe.training
    if spec.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    columns = _columns(model, data.train)
    shuffled = _batches(spec, data, columns, recipe.seed)
    kept_whole: Sequence[nn.Parameter] = ()
    if sharding.is_requested():
        kept_whole = sharding.shard(model, method, accelerator.device)
    groups = sharding.separated(method.parameter_groups(model, plan))
    prepared, optimizer = model, method.optimizer(groups, plan)
    if not sharding.is_requested():
        prepared, optimizer = accelerator.prepare(model, optimizer)
    validation = None
    if phase.validates and data.validation is not None:
        place = process_index(), process_count()
        validation = Validation(data.validation, data.collate, columns, data.measures, spec.eval_batch_size, *place)
    return Loop(
        accelerator=accelerator,
        method=method,
        model=prepared,
        optimizer=optimizer,
        scheduler=get_scheduler(
            "constant_with_warmup" if spec.schedule == "constant" else spec.schedule,
            optimizer=optimizer,
            num_warmup_steps=math.ceil(phase.steps * spec.warmup_ratio),
            num_training_steps=phase.steps,
        ),
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=spec.precision == "fp16"),
        precision=_precision(spec.precision, accelerator.device),
        measures=data.measures,
        batches=shuffled,
        validation=validation,
        steps=phase.steps,
        max_grad_norm=math.inf if spec.max_grad_norm is None else spec.max_grad_norm,
        intervals=_intervals(spec, shuffled.steps_per_epoch, validates=validation is not None),
        saver=saver,
        non_finite=NonFiniteSteps(
            run, data, phase.name, saver.first_step, spec.max_skipped if spec.non_finite == "skip" else 0
        ),
        reporting=reporting,
        interruption=Interruption(),
        kept_whole=kept_whole,
    )


def _intervals(spec: TrainingSpec, epoch: int, *, validates: bool) -> Intervals:
    """When a phase logs, validates and saves; ``epoch`` is the steps of one."""
    best = spec.best_metric if validates else None
    return Intervals(
        log=spec.logging_every,
        evaluate=spec.eval_every or epoch,
        save=spec.save_every or epoch,
        best_metric=best,
        greater_is_better=best is not None and METRICS[best].greater_is_better,
        patience=spec.early_stopping_patience if best else None,
    )


def _accelerator(recipe: Recipe, run: RunFolder) -> Accelerator:
    """Mixed precision is the loop's own: accelerate's is fixed for the life of the process."""
    try:
        accelerator = Accelerator(
            mixed_precision="no",
            log_with=list(recipe.report_to) or None,
            project_dir=str(run.path),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],
        )
        missing = [name for name in recipe.report_to if name not in {str(found) for found in accelerator.log_with}]
        if missing:
            raise ConfigError(f"report_to {', '.join(missing)}: not installed", "Install it, or leave it out.")
        if recipe.report_to:
            accelerator.init_trackers(recipe.name)
    except (ImportError, RuntimeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"report_to {', '.join(recipe.report_to)}: {reason}", "Correct report_to.") from error
    return accelerator


def _precision(name: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the autocast context of a precision. Raises ConfigError where the device does not have it."""
    if name == "fp16" and device.type != "cuda":
        raise ConfigError("training.precision fp16 needs a CUDA device", "Set it to bf16 or fp32.")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("training.precision bf16 is not supported by this GPU", "Set it to fp16 or fp32.")
    if name == "fp32":
        return nullcontext
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype)


def _batches(spec: TrainingSpec, data: PreparedData, columns: list[str], seed: int) -> Batches:
    micro, accumulated = batches(spec)
    return Batches(
        dataset=data.train,
        collate=data.collate,
        columns=columns,
        micro=micro,
        accumulated=accumulated,
        process=process_index(),
        processes=process_count(),
        seed=seed,
        lengths=[len(ids) for ids in data.train["input_ids"]] if spec.group_by_length else None,
        workers=spec.num_workers,
    )


def _columns(model: nn.Module, rows: Dataset) -> list[str]:
    """The columns that the model takes; some tokenizers give more."""
    base: Any = model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    taken: Sequence[str] = [*inspect.signature(base.forward).parameters, "labels"]
    return [name for name in rows.column_names if name in taken]


@contextmanager
def _named_memory(plan: Batches) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a pass over {plan.micro} rows does not fit into the memory of the device",
            "Lower training.micro_batch_size or data.max_length, or set training.gradient_checkpointing to true.",
        ) from error
