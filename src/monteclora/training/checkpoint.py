"""Checkpoints without pickle that resume to the bit: a mixin for ``transformers.Trainer``.

A checkpoint is the adapter as ``save_pretrained`` writes it, the Trainer's own ``trainer_state.json``, everything
else of the training state in one tree of tensors and numbers, and a manifest with checksums. It is written aside and
renamed. Where the Trainer's resumption differs from the uninterrupted run (running means of logged values, an
evaluation that was cut short, a run that had come to its end), the tree holds what is needed to make them equal.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import ExportableState

from monteclora.adapters.restore import load_adapter
from monteclora.errors import CheckpointError, DivergenceError
from monteclora.runs.manifest import Checkpoint, checkpoint_folder, rotate, write_manifest
from monteclora.system.atomic import new_folder
from monteclora.system.randomness import generator_states, restore_generators
from monteclora.system.tree import load_tree, save_tree
from monteclora.system.version import VERSION
from monteclora.training.interruption import Interruption

__all__ = ["CheckpointPlan", "CheckpointingMixin"]

_STATE = "training_state"


class _EvaluationInterrupted(Exception):  # noqa: N818 - not an error: a request to stop came in
    """Raised inside an evaluation to end it; it is repeated when the run resumes."""


@dataclasses.dataclass(frozen=True)
class CheckpointPlan:
    """Where a phase's checkpoints go, and what their manifests say of it.

    Attributes:
        folder: of all checkpoints of the run.
        keep: how many of the latest stay.
        recipe_sha256: of the recipe.
        phase: name of the phase.
        first_step: steps of the phases before.
    """

    folder: Path
    keep: int
    recipe_sha256: str
    phase: str
    first_step: int = 0


class _Hooks(TrainerCallback):
    """Finishes what a checkpoint left open, and stops where it is asked to."""

    def __init__(self, trainer: CheckpointingMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.after_resuming()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.interruption.agreed(args.device):
            self.trainer.interrupted = control.should_save = control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        # processes would stop at different batches
        if self.trainer.is_in_train and args.world_size == 1 and self.trainer.interruption.requested:
            raise _EvaluationInterrupted


class CheckpointingMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Put it in front of a Trainer class; set ``plan`` before training.

    Attributes:
        plan: where checkpoints go.
        interruption: asks training to save and stop.
        interrupted: whether it did.
    """

    plan: CheckpointPlan

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.interruption = Interruption()
        self.interrupted = False
        self._evaluation_pending = False
        self._stopped_early = False
        self._nothing_left = False
        self._resumed: tuple[str, dict[str, Any]] | None = None
        self.add_callback(_Hooks(self))

    # -- what subclasses add to a checkpoint ----------------------------------------------------------------------

    def progress_state(self) -> dict[str, Any]:
        """Where training stands, beside what the Trainer keeps itself."""
        return {
            "loss_sum": self._tr_loss.detach(),
            "loss_total": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }

    def restore_progress(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`progress_state` gave."""
        self._tr_loss = state["loss_sum"].to(self.args.device)
        self._total_loss_scalar = state["loss_total"]
        self._globalstep_last_logged = state["last_logged"]

    # -- saving ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """In place of the Trainer's: the whole checkpoint or none of it.

        Raises:
            DivergenceError: a weight is not finite.
            CheckpointError: the disk refuses it.
        """
        self.store_flos()
        generators = gather_object([generator_states()])
        if self.args.should_save:
            self._check_weights()
            checkpoint = self._describe()
            with new_folder(checkpoint.path) as stage:
                self.model.save_pretrained(str(stage), save_embedding_layers=False)
                (stage / "README.md").unlink(missing_ok=True)  # a checkpoint needs no model card
                self._save_trainer_state(stage)
                save_tree(stage / _STATE, self._training_state(generators))
                write_manifest(stage, checkpoint)
            best = [] if checkpoint.best_step is None else [self._path_of(checkpoint.best_step)]
            rotate(self.plan.folder, self.plan.keep, best)
        self.accelerator.wait_for_everyone()

    def _path_of(self, step: int) -> Path:
        return checkpoint_folder(self.plan.folder, self.plan.first_step + step)

    def _describe(self) -> Checkpoint:
        step = self.state.global_step
        return Checkpoint(
            path=self._path_of(step),
            recipe_sha256=self.plan.recipe_sha256,
            phase=self.plan.phase,
            first_step=self.plan.first_step,
            step=step,
            complete=self._at_the_end() and not self._evaluation_pending,
            versions={"monteclora": VERSION, "torch": torch.__version__},
            best_step=self.state.best_global_step,
        )

    def _at_the_end(self) -> bool:
        return self._stopped_early or self.state.global_step >= self.state.max_steps

    def _check_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise DivergenceError(
                    f"the weight {name} is not finite after step {self.state.global_step}",
                    "Lower training.learning_rate, or set training.max_grad_norm.",
                )

    def _save_trainer_state(self, stage: Path) -> None:
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, ExportableState)]
        state = dataclasses.replace(
            self.state,
            log_history=[],  # it is in metrics.jsonl
            stateful_callbacks={type(callback).__name__: callback.state() for callback in callbacks},
        )
        state.save_to_json(str(stage / "trainer_state.json"))

    def _training_state(self, generators: list[dict[str, Any]]) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "parameters": self._optimized_names(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "generators": generators,
            "evaluation_pending": self._evaluation_pending,
            "stopped_early": self._stopped_early,
            "progress": self.progress_state(),
        }

    def _optimized_names(self) -> list[list[str]]:
        """The names of the optimised weights, group by group: the optimiser knows them by their order alone."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]

    # -- resuming -------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """In place of the Trainer's: the adapter and its posterior."""
        load_adapter(self.model if model is None else model, Path(resume_from_checkpoint))

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """As in the Trainer, with the intervals of this run's arguments rather than those of the checkpoint's."""
        result: tuple[int, int] = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return result

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """In place of the Trainer's: the whole training state but the generators'."""
        if checkpoint is None:
            return
        state = load_tree(Path(checkpoint) / _STATE)
        if state["parameters"] != self._optimized_names():
            raise CheckpointError(
                f"{checkpoint} was trained with other weights than this model trains",
                "Use the versions of peft and transformers that environment.json names.",
            )
        self._load_optimizer(state["optimizer"], state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._evaluation_pending = state["evaluation_pending"]
        self._stopped_early = state["stopped_early"]
        self._resumed = checkpoint, state["progress"]

    def _load_optimizer(self, optimizer: dict[str, Any], scheduler: dict[str, Any]) -> None:
        """Moments and position of the checkpoint, options of this run's arguments: where both are the same, no change.

        ``load_state_dict`` would bring back the learning rate and the weight decay of the checkpoint.
        """
        groups, schedule = self.optimizer.param_groups, self.lr_scheduler
        options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        highest = list(schedule.base_lrs)
        self.optimizer.load_state_dict(optimizer)
        factors = [factor(scheduler["last_epoch"]) for factor in schedule.lr_lambdas]
        rates = [rate * factor for rate, factor in zip(highest, factors, strict=True)]
        schedule.load_state_dict({**scheduler, "base_lrs": highest, "_last_lr": rates})
        for group, own, rate in zip(self.optimizer.param_groups, options, rates, strict=True):
            group.update(own, lr=rate)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Done with the optimiser."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """In place of the Trainer's, which calls it when the batches already seen have been passed over."""
        if checkpoint is None:
            return
        generators = load_tree(Path(checkpoint) / _STATE)["generators"]
        if len(generators) != self.args.world_size:
            raise CheckpointError(
                f"{checkpoint} was written by {len(generators)} processes, this run has {self.args.world_size}",
                "Resume with the same number of processes.",
            )
        restore_generators(generators[self.args.process_index])

    def after_resuming(self) -> None:
        """Take up the running means, and make up for an evaluation that was cut short."""
        if self._resumed is None:
            return
        checkpoint, progress = self._resumed
        self._resumed = None
        self.restore_progress(progress)
        if self._evaluation_pending:
            self._evaluation_pending = False
            self._load_rng_state(checkpoint)  # the new checkpoint takes the place of this one
            self._determine_best_metric(self._evaluate(None, None), None)
            self._save_checkpoint(self.model_wrapped)
        self._nothing_left = self._at_the_end() or self.interrupted

    def _run_epoch(self, **kwargs: Any) -> None:
        """As in the Trainer, which would train one step more in a run that had come to its end."""
        if not self._nothing_left:
            super()._run_epoch(**kwargs)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the Trainer; the step is saved when it is the last one, and when evaluation was interrupted."""
        stopping, self.control.should_training_stop = self.control.should_training_stop, False
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        except _EvaluationInterrupted:
            self._evaluation_pending = self.interrupted = True
            self.callback_handler.eval_dataloader.end()  # accelerate believes it is still being read
            metrics = {}
        self._stopped_early |= self.control.should_training_stop
        if self._stopped_early or self.interrupted or stopping:
            self.control.should_training_stop = self.control.should_save = True
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As in the Trainer; the best checkpoint is saved whatever the interval of saving."""
        best = bool(metrics) and super()._determine_best_metric(metrics, trial)
        if best:
            self.control.should_save = True
        return best
