"""Checkpoints without pickle that resume to the bit.

A checkpoint is what the method saves, the rest of the training state in one tree of tensors and numbers, and a manifest
with checksums. It is written aside and renamed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from monteclora.errors import CheckpointError, DivergenceError
from monteclora.runs.manifest import Checkpoint, checkpoint_folder, rotate, write_manifest
from monteclora.system.atomic import new_folder
from monteclora.system.devices import process_count, process_index
from monteclora.system.randomness import generator_states, restore_generators
from monteclora.system.tree import load_tree, save_tree
from monteclora.system.version import VERSION
from monteclora.training import sharding
from monteclora.training.agreement import by_main_process
from monteclora.training.loop import Loop
from monteclora.training.state import TrainingState

__all__ = ["Checkpoints", "restore", "saved_state"]

_STATE = "training_state"


@dataclass(frozen=True)
class Checkpoints:
    """Writes the checkpoints of a phase.

    Attributes:
        folder: of all checkpoints of the run.
        keep: how many of the latest stay.
        recipe_sha256: of the recipe; the main process alone needs it.
        phase: name of the phase.
        first_step: steps of the phases before.
        trained: names of the parameters that any phase of the run trains: they are saved.
        resumed_from: the checkpoint whose generators are taken up; None for none.
    """

    folder: Path
    keep: int
    recipe_sha256: str
    phase: str
    first_step: int
    trained: frozenset[str]
    resumed_from: Path | None

    def save(self, loop: Loop) -> None:
        """Write the whole checkpoint of the step, or nothing of it.

        Raises:
            DivergenceError: a weight is not finite, or the method has diverged.
            CheckpointError: the disk refuses it.
        """
        generators = gather_object([generator_states()])
        model = loop.accelerator.unwrap_model(loop.model)
        sharding.reshard(model)
        state = _training_state(loop, generators)
        with sharding.gathered(model, self.trained):
            by_main_process(lambda: self._write(model, loop, state))
        loop.accelerator.wait_for_everyone()

    def _write(self, model: nn.Module, loop: Loop, state: dict[str, Any]) -> None:
        _check_weights(model, loop)
        checkpoint = self._describe(loop)
        with new_folder(checkpoint.path) as stage:
            loop.method.save(model, stage)
            save_tree(stage / _STATE, state)
            write_manifest(stage, checkpoint)
        steps = (loop.state.best_step, loop.state.good_step, loop.state.good_best)
        rotate(self.folder, self.keep, [self.path_of(step) for step in steps if step is not None])

    def path_of(self, step: int) -> Path:
        """The folder of the checkpoint of a step of this phase."""
        return checkpoint_folder(self.folder, self.first_step + step)

    def restore_generators(self) -> None:
        """Put the generators of this process into the state of the checkpoint that the phase resumes from."""
        if self.resumed_from is None:
            return
        generators = load_tree(self.resumed_from / _STATE)["generators"]
        if len(generators) != process_count():
            raise CheckpointError(
                f"{self.resumed_from} was written by {len(generators)} processes, this run has {process_count()}",
                "Resume with the same number of processes.",
            )
        restore_generators(generators[process_index()])

    def _describe(self, loop: Loop) -> Checkpoint:
        return Checkpoint(
            path=self.path_of(loop.state.step),
            recipe_sha256=self.recipe_sha256,
            phase=self.phase,
            first_step=self.first_step,
            step=loop.state.step,
            complete=loop.at_the_end,
            versions={"monteclora": VERSION, "torch": torch.__version__},
            best_step=loop.state.best_step,
        )


def restore(loop: Loop, checkpoint: Path) -> None:
    """Put optimiser, schedule and state of a checkpoint into a loop that has not begun; its model has the weights.

    Raises:
        CheckpointError: it does not fit.
    """
    model = loop.accelerator.unwrap_model(loop.model)
    tree = load_tree(checkpoint / _STATE)
    if _current_names(tree["parameters"]) != _optimized_names(model, loop.optimizer):
        raise CheckpointError(
            f"{checkpoint} was trained with other weights than this model trains",
            "Use the versions of peft and transformers that environment.json names.",
        )
    _restore_optimizer(loop, tree["optimizer"], tree["scheduler"])
    if loop.scaler.is_enabled() and tree["scaler"]:
        loop.scaler.load_state_dict(tree["scaler"])
    loop.state = _state_in(checkpoint, tree)
    loop.resumed = True


def saved_state(checkpoint: Path) -> TrainingState:
    """Where the phase stood at a checkpoint. Raises CheckpointError where it cannot be read."""
    return _state_in(checkpoint, load_tree(checkpoint / _STATE))


def _state_in(checkpoint: Path, tree: dict[str, Any]) -> TrainingState:
    return TrainingState.from_tree(tree["state"] if "state" in tree else _state_of_0_1(checkpoint, tree))


def _training_state(loop: Loop, generators: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "optimizer": sharding.whole(loop.optimizer.state_dict()),
        "parameters": _optimized_names(loop.accelerator.unwrap_model(loop.model), loop.optimizer),
        "scheduler": loop.scheduler.state_dict(),
        "scaler": loop.scaler.state_dict(),
        "generators": list(generators),
        "state": loop.state.to_tree(),
    }


def _optimized_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the optimised weights, group by group: the optimiser knows them by their order alone."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _current_names(groups: list[list[str]]) -> list[list[str]]:
    """Version 0.1 gave posteriors numbers in place of their adapters' names; a run has one."""
    return [[re.sub(r"^posteriors\.0\.", "posteriors.default.", name) for name in group] for group in groups]


def _restore_optimizer(loop: Loop, optimizer: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Moments and position of the checkpoint, options of this run's recipe: where both are the same, no change.

    ``load_state_dict`` would bring back the learning rate and the weight decay of the checkpoint.
    """
    groups, schedule = loop.optimizer.param_groups, loop.scheduler
    options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    peaks = list(schedule.base_lrs)
    parameters = [parameter for group in groups for parameter in group["params"]]
    moments = {
        index: {name: sharding.as_sharded(value, parameters[index]) for name, value in of.items()}
        for index, of in optimizer["state"].items()
    }
    loop.optimizer.load_state_dict({**optimizer, "state": moments})
    factors = [factor(scheduler["last_epoch"]) for factor in schedule.lr_lambdas]  # type: ignore[attr-defined]
    rates = [rate * factor for rate, factor in zip(peaks, factors, strict=True)]
    schedule.load_state_dict({**scheduler, "base_lrs": peaks})
    for group, own, rate in zip(loop.optimizer.param_groups, options, rates, strict=True):
        group.update(own, lr=rate)


def _check_weights(model: nn.Module, loop: Loop) -> None:
    """Raises DivergenceError; for the main process, which alone has whole weights."""
    found = _divergence(model, loop)
    if found is not None:
        raise DivergenceError(
            f"{found} after step {loop.state.step}",
            "Lower training.learning_rate (or training.post_hoc.learning_rate_factor), or set training.max_grad_norm.",
        )


def _divergence(model: nn.Module, loop: Loop) -> str | None:
    """What is wrong with the weights, in words."""
    found = loop.method.diverged(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            found = f"the weight {name} is not finite"
    return found


def _state_of_0_1(checkpoint: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint of version 0.1, half of which transformers' Trainer wrote."""
    progress = tree["progress"]
    try:
        trainer = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        patience = trainer["stateful_callbacks"].get("EarlyStoppingCallback", {}).get("attributes", {})
        return {
            "step": trainer["global_step"],
            "tokens": int(trainer["num_input_tokens_seen"]),
            "best_value": trainer["best_metric"],
            "best_step": trainer["best_global_step"],
            "worse": patience.get("early_stopping_patience_counter", 0),
            "stopped_early": tree["stopped_early"],
            "evaluation_pending": tree["evaluation_pending"],
            "logged_step": progress["last_logged"],
            "loss": float(progress["task_loss"]),
            "objective": float(progress.get("objective", progress["loss_sum"])),
            "finite_steps": progress["task_steps"],
            "grad_norm": 0.0,
            "learning_rate": 0.0,
            "numbers": {},
            "skipped": progress.get("skipped", 0),
            "skipped_in_a_row": progress.get("skipped_in_a_row", 0),
            "seconds": progress["seconds"],
        }
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint} holds no readable training state ({type(error).__name__}: {error})",
            "Remove the folder; an older checkpoint is used.",
        ) from error
