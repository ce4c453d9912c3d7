"""The phases of a run, and how one of them is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments

from monteclora.adapters.model import active_posteriors, train_posterior_only
from monteclora.adapters.restore import load_adapter
from monteclora.errors import ConfigError
from monteclora.methods import get_method
from monteclora.metrics.registry import METRICS
from monteclora.runs.manifest import Checkpoint, checkpoint_folder
from monteclora.runs.prepare import PreparedData
from monteclora.runs.recipe import Recipe, TrainingSpec, recipe_sha256
from monteclora.runs.run_folder import RunFolder
from monteclora.system.devices import process_count
from monteclora.training.callbacks import LogEverything, ShowProgress
from monteclora.training.checkpoint import CheckpointPlan
from monteclora.training.divergence import NonFiniteSteps
from monteclora.training.interruption import TrainingInterrupted, stop_on_signals
from monteclora.training.run_trainer import ROW, RunTrainer
from monteclora.training.sampler import LengthGroupedSampler

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Outcome", "Phase", "batches", "phases_of", "steps_per_epoch", "train_phase"]


_STOPPING = "\nstopping: this step is finished and saved first; asked again, it stops at once\n"


@dataclass(frozen=True)
class Phase:
    """A part of a run with an optimiser of its own.

    Attributes:
        name: ``cooperative`` trains everything; ``adapter`` a plain LoRA; ``posterior`` rho and eta alone.
        steps: most optimiser steps.
        learning_rate: at its highest.
    """

    name: Literal["cooperative", "adapter", "posterior"]
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
        kept_step: the one whose weights it ended with.
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
    micro, accumulated = batches(spec)
    return math.ceil(math.ceil(rows / (micro * process_count())) / accumulated)


def batches(spec: TrainingSpec) -> tuple[int, int]:
    """Rows a forward pass of one process, and passes a step.

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


def _steps(spec: TrainingSpec, rows: int, epochs: float, most: int | None) -> int:
    steps = math.ceil(epochs * steps_per_epoch(spec, rows))
    return steps if most is None else min(steps, most)


def _arguments(recipe: Recipe, phase: Phase, run: RunFolder, data: PreparedData) -> TrainingArguments:
    spec = recipe.training
    micro, accumulated = batches(spec)
    per_epoch = steps_per_epoch(spec, len(data.train))
    validates = phase.validates and data.validation is not None
    best = spec.best_metric if validates else None
    try:
        arguments = TrainingArguments(
            output_dir=str(run.path),
            run_name=recipe.name,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulated,
            per_device_eval_batch_size=spec.eval_batch_size,
            max_steps=phase.steps,
            learning_rate=phase.learning_rate,
            lr_scheduler_type="constant_with_warmup" if spec.schedule == "constant" else spec.schedule,
            warmup_steps=spec.warmup_ratio,
            weight_decay=spec.weight_decay,
            max_grad_norm=spec.max_grad_norm or 0.0,
            activation_checkpointing=spec.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=not torch.accelerator.is_available(),
            bf16=spec.precision == "bf16",
            fp16=spec.precision == "fp16",
            eval_strategy="steps" if validates else "no",
            eval_steps=spec.eval_every or per_epoch,
            save_strategy="steps",
            save_steps=spec.save_every or per_epoch,
            logging_steps=spec.logging_every,
            logging_nan_inf_filter=False,
            metric_for_best_model=best,
            greater_is_better=METRICS[best].greater_is_better if best else None,
            restore_callback_states_from_checkpoint=True,
            seed=recipe.seed,
            data_seed=recipe.seed,
            dataloader_num_workers=spec.num_workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            include_num_input_tokens_seen="non_padding",
            ddp_find_unused_parameters=False,
            report_to=list(recipe.report_to),
            disable_tqdm=True,
            log_level="error",
            log_level_replica="error",
        )
    except ValueError as error:
        raise ConfigError(f"transformers refuses the training section: {error}", "Correct it.") from error
    device = arguments.device
    # one process trains on one device: DataParallel would split a draw of the posterior over several
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if spec.precision == "fp16" and device.type != "cuda":
        raise ConfigError("training.precision fp16 needs a CUDA device", "Set it to bf16 or fp32.")
    if spec.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("training.precision bf16 is not supported by this GPU", "Set it to fp16 or fp32.")
    return arguments


def _set_trainable(model: PeftModel, recipe: Recipe, phase: Phase) -> None:
    if phase.name == "posterior":
        train_posterior_only(model)
    elif get_method(recipe.method.name).has_posterior:
        for posterior in active_posteriors(model):
            posterior.enabled = phase.name == "cooperative"
            posterior.requires_grad_(posterior.enabled)


def train_phase(
    recipe: Recipe,
    phase: Phase,
    run: RunFolder,
    data: PreparedData,
    model: PeftModel,
    *,
    first_step: int,
    resume: Checkpoint | None,
    console: Console,
) -> Outcome:
    """Train one phase, from its start or from one of its checkpoints; ``model`` ends with the weights to keep.

    Raises:
        TrainingInterrupted: after saving, when that was asked for.
        DivergenceError: the loss or a gradient is not finite.
        CheckpointError: the checkpoint does not fit, or the disk is full.
        ConfigError: the recipe asks for something this machine or version cannot do.
    """
    _set_trainable(model, recipe, phase)
    title = recipe.name if phase.name == "cooperative" else f"{recipe.name} ({phase.name})"
    progress = ShowProgress(title, console)
    trainer = _trainer(recipe, phase, run, data, model, [LogEverything(run.metrics, phase.name, first_step), progress])
    trainer.plan = CheckpointPlan(
        folder=run.checkpoints,
        keep=recipe.training.keep_checkpoints,
        recipe_sha256=recipe_sha256(recipe),
        phase=phase.name,
        first_step=first_step,
    )
    trainer.non_finite = NonFiniteSteps(
        run=run,
        data=data,
        phase=phase.name,
        first_step=first_step,
        most_in_a_row=recipe.training.max_skipped if recipe.training.non_finite == "skip" else 0,
    )
    try:
        with stop_on_signals("" if console.quiet else _STOPPING) as trainer.interruption:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume.path))
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a pass over {trainer.args.per_device_train_batch_size} rows does not fit into the memory of the device",
            "Lower training.micro_batch_size or data.max_length, or set training.gradient_checkpointing to true.",
        ) from error
    finally:
        progress.close()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if trainer.interrupted:
        total = first_step + trainer.state.global_step
        raise TrainingInterrupted(f"{run.path} is saved at step {total}: the same command resumes it")
    last, best = trainer.state.global_step, trainer.state.best_global_step
    if best is not None and best != last:
        load_adapter(model, checkpoint_folder(run.checkpoints, first_step + best))
    return Outcome(
        step=first_step + last,
        kept_step=first_step + (last if best is None else best),
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=trainer.seconds,
        skipped_steps=trainer.non_finite.skipped,
    )


def _trainer(
    recipe: Recipe, phase: Phase, run: RunFolder, data: PreparedData, model: PeftModel, callbacks: list[Any]
) -> RunTrainer:
    arguments = _arguments(recipe, phase, run, data)
    patience = recipe.training.early_stopping_patience
    if patience is not None and arguments.metric_for_best_model is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=patience))
    try:
        trainer = RunTrainer(
            model=model,
            args=arguments,
            data_collator=data.collate,
            train_dataset=data.train.add_column(ROW, list(range(len(data.train)))),
            eval_dataset=data.validation if phase.validates else None,
            compute_metrics=data.measures.compute,
            preprocess_logits_for_metrics=data.measures.reduce,
            callbacks=callbacks,
        )
    except (ImportError, RuntimeError, ValueError) as error:
        if recipe.report_to and not isinstance(error, ConfigError):
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"report_to {', '.join(recipe.report_to)}: {reason}", "Correct report_to.") from error
        raise
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "a run trains on one device, or on several that each hold the whole model",
            "Launch it without FSDP and DeepSpeed, or use monteclora.MonteCLoRATrainer in a program of your own.",
        )
    trainer.remove_callback(PrinterCallback)
    if recipe.training.group_by_length:
        lengths = [len(ids) for ids in data.train["input_ids"]]
        trainer.order = LengthGroupedSampler(lengths, recipe.training.batch_size, recipe.seed)
    return trainer
