"""The loop of a phase from its parts: model, optimiser, schedule, batches, validation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from monteclora.errors import ConfigError
from monteclora.methods import Method
from monteclora.methods.base import Plan
from monteclora.metrics.registry import METRICS
from monteclora.runs.prepare import PreparedData
from monteclora.runs.recipe import Recipe, TrainingSpec
from monteclora.runs.run_folder import RunFolder
from monteclora.system.devices import process_count, process_index
from monteclora.training import sharding
from monteclora.training.batches import Batches
from monteclora.training.interruption import Interruption
from monteclora.training.loop import Intervals, Loop, NonFinite, Saver
from monteclora.training.plans import Phase, batches, warmup_steps
from monteclora.training.reporting import Reporting
from monteclora.training.validation import Validation

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["accelerator_of", "assemble", "named_memory", "precision_of", "validation_of"]


def assemble(
    recipe: Recipe,
    phase: Phase,
    plan: Plan,
    data: PreparedData,
    model: nn.Module,
    method: Method,
    accelerator: Accelerator,
    saver: Saver,
    non_finite: NonFinite,
    reporting: Reporting,
) -> Loop:
    """The loop of a phase, about to begin.

    Args:
        recipe, phase, plan, data: what is trained, and on what.
        model: as the method's ``begin_phase`` left it.
        method, accelerator, saver, non_finite, reporting: see :class:`Loop`.

    Raises:
        ConfigError: the recipe asks for something this machine or version cannot do.
    """
    spec = recipe.training
    if spec.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shuffled = _batches(spec, data, _columns(model, data.train), recipe.seed)
    validation = validation_of(spec, data, model) if phase.validates else None
    kept_whole: Sequence[nn.Parameter] = ()
    if sharding.is_requested():
        kept_whole = sharding.shard(model, method, accelerator.device)
    # accelerate's clipping knows sharded gradients, and looks for them in every step; its optimiser looks for a library
    prepared, clip = model.train(), accelerator.clip_grad_norm_
    if not sharding.is_requested():
        prepared, clip = accelerator.prepare(model), torch.nn.utils.clip_grad_norm_
    optimizer = method.optimizer(sharding.separated(method.parameter_groups(model, plan)), plan)
    return Loop(
        accelerator=accelerator,
        method=method,
        model=prepared,
        optimizer=optimizer,
        scheduler=_scheduler(spec, optimizer, phase.steps),
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=spec.precision == "fp16"),
        precision=precision_of(spec.precision, accelerator.device),
        measures=data.measures,
        batches=shuffled,
        validation=validation,
        steps=phase.steps,
        clip=clip,
        max_grad_norm=math.inf if spec.max_grad_norm is None else spec.max_grad_norm,
        intervals=_intervals(spec, shuffled.steps_per_epoch, validates=validation is not None),
        saver=saver,
        non_finite=non_finite,
        reporting=reporting,
        interruption=Interruption(),
        kept_whole=kept_whole,
    )


def validation_of(spec: TrainingSpec, data: PreparedData, model: nn.Module) -> Validation | None:
    """The validation of a model by this process and the others; None where there are no rows for it."""
    if data.validation is None:
        return None
    columns, place = _columns(model, data.train), (process_index(), process_count())
    return Validation(data.validation, data.collate, columns, data.measures, spec.eval_batch_size, *place)


def _scheduler(spec: TrainingSpec, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    return get_scheduler(
        "constant_with_warmup" if spec.schedule == "constant" else spec.schedule,
        optimizer=optimizer,
        num_warmup_steps=warmup_steps(spec, steps),
        num_training_steps=steps,
    )


def _intervals(spec: TrainingSpec, epoch: int, *, validates: bool) -> Intervals:
    """When a phase logs, validates and saves; ``epoch`` is the steps of one."""
    best = spec.best_metric if validates else None
    return Intervals(
        log=spec.logging_every,
        evaluate=spec.eval_every or epoch,
        save=spec.save_every or epoch,
        best_metric=best,
        greater_is_better=best is not None and bool(METRICS[best].greater_is_better),
        patience=spec.early_stopping_patience if best else None,
    )


def accelerator_of(recipe: Recipe, run: RunFolder) -> Accelerator:
    """Of this process. Mixed precision is the loop's own: accelerate's is fixed for the life of the process.

    Raises:
        ConfigError: a tracker that the recipe reports to is missing, or refuses.
    """
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


def precision_of(name: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
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
def named_memory(plan: Batches) -> Iterator[None]:
    """Raises ConfigError in the place of an error that says that the device's memory is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a pass over {plan.micro} rows does not fit into the memory of the device",
            "Lower training.micro_batch_size or data.max_length, or set training.gradient_checkpointing to true.",
        ) from error
