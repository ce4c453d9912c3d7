"""The Trainer of a run: the mixins, and what makes its numbers honest."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from monteclora.system.randomness import preserved_generators
from monteclora.training.checkpoint import CheckpointingMixin
from monteclora.training.divergence import NonFiniteSteps, Part
from monteclora.training.trainer import MonteCLoRATrainerMixin

__all__ = ["ROW", "RunTrainer"]

ROW = "row"
"""The column of the training rows that says which they are."""


class _Batch(NamedTuple):
    """What a batch adds to its step: its rows, and its shares of the task's loss and of the objective (scalars)."""

    rows: Tensor
    task: Tensor
    objective: Tensor


class _TaskLossMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Keeps the task's part of a batch's loss.

    It stands behind the MonteCLoRA mixin, which adds the regulariser to what this one returns.
    """

    batch_task_loss: Tensor

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
            self.batch_task_loss = loss.detach() * self._accumulated_batches(num_items_in_batch) / batches
        return result


class RunTrainer(CheckpointingMixin, MonteCLoRATrainerMixin, _TaskLossMixin, Trainer):
    """What a run trains with, whatever its method.

    Beside what its mixins do: ``loss`` in the log is the task's alone (``objective`` has the regulariser too), so that
    methods can be compared; and a step whose loss or gradient is not finite stops the run or is skipped, before the
    weights take it up. The training rows have a column ``row``.

    Attributes:
        non_finite: what to do with such a step; set before training.
        order: of the training rows, in place of the Trainer's; set before training.
    """

    non_finite: NonFiniteSteps

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order: Sampler[int] | None = None
        self._batches: list[_Batch] = []
        self._sums = torch.zeros(2, device=self.args.device)  # of the task's loss and the objective, since the last log
        self._counted_steps = 0
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        """As in the Trainer, unless ``order`` names another one."""
        return super()._get_train_sampler(train_dataset) if self.order is None else self.order

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._seconds_before + time.perf_counter() - self._started

    def progress_state(self) -> dict[str, Any]:
        """Beside the mixin's: the running means, the skipped steps, and the clock."""
        return {
            **super().progress_state(),
            "task_loss": self._sums[0],
            "objective": self._sums[1],
            "task_steps": self._counted_steps,
            "skipped": self.non_finite.skipped,
            "skipped_in_a_row": self.non_finite.in_a_row,
            "seconds": self.seconds,
        }

    def restore_progress(self, state: dict[str, Any]) -> None:
        """As the mixin."""
        super().restore_progress(state)
        # the first checkpoints had the Trainer's own sum alone, and no step was ever skipped
        objective = state.get("objective", state["loss_sum"])
        self._sums = torch.stack([state["task_loss"], objective]).to(self.args.device)
        self._counted_steps = state["task_steps"]
        self.non_finite.skipped = state.get("skipped", 0)
        self.non_finite.in_a_row = state.get("skipped_in_a_row", 0)
        self._seconds_before, self._started = state["seconds"], time.perf_counter()

    # -- steps that are not finite --------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        """As in the Trainer, which removes the columns that the model does not take: keep the one this class takes."""
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns.append(ROW)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in the Trainer."""
        rows = inputs.pop(ROW)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._batches.append(_Batch(rows, self.batch_task_loss.float(), loss.float()))
        return loss

    def check_loss(self, loss: Tensor) -> None:
        """Left to the end of the step, where one look at the device's numbers is enough for all its batches."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in the Trainer, which calls it between the backward pass and the optimiser's step.

        A step that is skipped has no gradient left when this returns, so that the optimiser passes over every weight,
        its moments and its decay; the learning rate goes on with its schedule.

        Raises:
            DivergenceError: the loss or the gradient is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        batches, self._batches = self._batches, []
        sums = torch.stack([torch.stack([b.task, b.objective]) for b in batches]).sum(0)
        part, culprits = self._not_finite(batches, sums, torch.as_tensor(norm).to(sums))
        if part is None:
            self._sums += sums
            self._counted_steps += 1
            self.non_finite.finite()
            return norm
        indices = [index for batch in culprits for index in batch.rows.tolist()]
        if self.args.world_size > 1:
            indices = gather_object(indices)
        self.non_finite.met(self.state.global_step + 1, part, indices, writes=self.args.should_save)
        model.zero_grad(set_to_none=True)
        self._tr_loss.zero_()  # the Trainer's own sum, which this step is in already
        if part == "regulariser":
            self._regulariser = None
        return None

    def _not_finite(self, batches: list[_Batch], sums: Tensor, norm: Tensor) -> tuple[Part | None, list[_Batch]]:
        """The first part of the step that is not finite, in any process; and this process's batches that are to blame.

        Costs one transfer from the device.
        """
        agreed = torch.cat([sums, norm.reshape(1)])
        if self.args.world_size > 1:
            agreed = self.accelerator.reduce(agreed, reduction="sum")
        own = torch.stack([batch.objective for batch in batches])
        task, objective, size, *losses = torch.cat([agreed, own]).tolist()
        if not math.isfinite(objective):
            culprits = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
            return ("regulariser" if math.isfinite(task) else "loss"), culprits
        scaler = self.accelerator.scaler
        # fp16 finds its loss scale by overflowing: the scaler passes over such a step and halves the scale
        tolerated = scaler is not None and scaler.get_scale() > 1
        return (None if math.isfinite(size) or tolerated else "gradient"), batches

    # -- what is logged -------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the Trainer; without ``eval_loss``, a mean of the batches' means that ``nll`` makes exact."""
        with preserved_generators():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the Trainer, with the task's loss apart from the objective; nothing where every step was skipped."""
        if "loss" in logs:
            if not self._counted_steps:
                return
            logs["loss"], objective = self._means()
            if self._regulariser is not None:
                logs["objective"] = objective
        logs.pop("eval_loss", None)
        super().log(logs, *args, **kwargs)

    def _means(self) -> tuple[float, float]:
        """Of the task's loss and the objective, over the steps since the last call and over processes."""
        task, objective = self.accelerator.gather(self._sums.reshape(1, 2)).mean(0).tolist()
        steps, self._counted_steps = self._counted_steps, 0
        self._sums.zero_()
        return task / steps, objective / steps
