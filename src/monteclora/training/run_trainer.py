"""The Trainer of a run: the mixins, and what makes its numbers honest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from monteclora.errors import DivergenceError
from monteclora.training.checkpoint import CheckpointingMixin
from monteclora.training.randomness import preserved_generators
from monteclora.training.trainer import MonteCLoRATrainerMixin

__all__ = ["RunTrainer"]


class _TaskLossMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Adds up the task's part of the loss.

    It stands behind the MonteCLoRA mixin, which adds the regulariser to what this one returns.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.task_loss = torch.zeros((), device=self.args.device)
        self.task_steps = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            loss = result[0] if return_outputs else result
            batches = self.current_gradient_accumulation_steps
            counted = self._accumulated_batches(num_items_in_batch)
            self.task_loss += loss.detach() * counted / batches
        return result

    def mean_task_loss(self) -> float:
        """The mean over the steps since the last call, and over processes."""
        total = self.accelerator.gather(self.task_loss.reshape(1)).mean().item()
        steps, self.task_steps = self.task_steps, 0
        self.task_loss.zero_()
        return total / max(steps, 1)


class RunTrainer(CheckpointingMixin, MonteCLoRATrainerMixin, _TaskLossMixin, Trainer):
    """What a run trains with, whatever its method.

    Beside what its mixins do: ``loss`` in the log is the task's alone (``objective`` has the regulariser too), so that
    methods can be compared; evaluation leaves the global generators as they were, so that how often it happens does
    not change dropout; and the first step whose loss or gradient is not finite raises DivergenceError, before the
    weights take it up.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_loss = torch.zeros((), device=self.args.device)
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._seconds_before + time.perf_counter() - self._started

    def progress_state(self) -> dict[str, Any]:
        """Beside the mixin's: the running mean of the task's loss, and the clock."""
        state = super().progress_state()
        return {**state, "task_loss": self.task_loss, "task_steps": self.task_steps, "seconds": self.seconds}

    def restore_progress(self, state: dict[str, Any]) -> None:
        """As the mixin."""
        super().restore_progress(state)
        self.task_loss = state["task_loss"].to(self.args.device)
        self.task_steps = state["task_steps"]
        self._seconds_before, self._started = state["seconds"], time.perf_counter()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in the Trainer."""
        loss = super().training_step(*args, **kwargs)
        self._step_loss += loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in the Trainer, which calls it between the backward pass and the optimiser's step.

        Raises:
            DivergenceError: the loss or the gradient is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.task_steps += 1
        loss, norm_value = torch.stack([self._step_loss, torch.as_tensor(norm).to(self._step_loss)]).tolist()
        self._step_loss.zero_()
        scaler = self.accelerator.scaler
        # fp16 finds its loss scale by overflowing: the scaler passes over such a step and halves the scale
        tolerated = scaler is not None and scaler.get_scale() > 1
        finite = float("inf") > abs(loss), tolerated or float("inf") > abs(norm_value)
        if not all(finite):
            what = "gradient" if finite[0] else "loss"
            raise DivergenceError(
                f"the {what} is not finite at step {self.state.global_step + 1}",
                "Lower training.learning_rate or set training.max_grad_norm; the last checkpoint is finite.",
            )
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the Trainer; without ``eval_loss``, a mean of the batches' means that ``nll`` makes exact."""
        with preserved_generators():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the Trainer, with the task's loss apart from the objective."""
        if "loss" in logs:
            objective, logs["loss"] = logs["loss"], self.mean_task_loss()
            if self._regulariser is not None:
                logs["objective"] = objective
        logs.pop("eval_loss", None)
        super().log(logs, *args, **kwargs)
