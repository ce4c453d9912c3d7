"""The Trainer of a run: the mixins, and what makes its numbers honest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from monteclora.adapters.model import MonteCLoRAModel, active_posteriors, regularisers
from monteclora.errors import DivergenceError
from monteclora.posterior import Regulariser
from monteclora.system.randomness import preserved_generators
from monteclora.training.checkpoint import CheckpointingMixin
from monteclora.training.divergence import NonFiniteSteps, Part

__all__ = ["ROW", "RunTrainer"]

ROW = "row"
"""The column of the training rows that says which they are."""


_CLASSIFIERS = {
    *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
}


def _classification_loss(config: Any) -> Callable[..., Tensor]:
    """The loss of a classification head as a sum over the accumulated batch, divided by its number of labels.

    Args:
        config: the model's configuration; ``problem_type`` is read as transformers reads it.

    Returns:
        A ``compute_loss_func`` for ``transformers.Trainer``.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        labels = labels.to(logits.device)
        integral = labels.dtype in (torch.long, torch.int)
        single = config.problem_type == "single_label_classification" or config.problem_type is None
        if config.num_labels > 1 and integral and single:
            flat = logits.view(-1, config.num_labels).float()
            total = nn.functional.cross_entropy(flat, labels.view(-1).long(), reduction="sum")
            count = labels.ne(-100).sum()
        elif config.num_labels == 1 or config.problem_type == "regression":
            total = nn.functional.mse_loss(logits.view(labels.shape).float(), labels.float(), reduction="sum")
            count = torch.tensor(labels.numel())
        else:
            total = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
            count = torch.tensor(labels.numel())
        divisor = count if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(divisor, device=total.device).clamp(min=1)

    return loss


class _ObjectiveMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """The regulariser once per optimiser step, and classification losses normalised by the rows of the whole step."""

    compute_loss_func: Callable[..., Any] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self.compute_loss_func is None and self.label_smoother is None and type(base).__name__ in _CLASSIFIERS:
            self.compute_loss_func = _classification_loss(base.config)
        self._regulariser: Regulariser | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss, in training plus this batch's share of the regulariser (METHOD.md sections 4 and 7)."""
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not model.training or not self.has_posterior():
            return result
        loss, *outputs = result if return_outputs else (result,)
        parts = [p for p, q in zip(regularisers(model), active_posteriors(model), strict=True) if q.enabled]
        if parts:
            self._regulariser = parts[0].detach()
            share = torch.stack([part.loss for part in parts]).sum().to(loss.device)
            loss = loss + share / self._accumulated_batches(num_items_in_batch)
        return (loss, *outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in the Trainer.

        Raises:
            DivergenceError: the loss is not finite; the weights have not taken it up.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        self.check_loss(loss)
        return loss

    def check_loss(self, loss: Tensor) -> None:
        """Raise DivergenceError for the loss of a batch that is not finite."""
        if not loss.isfinite():
            raise DivergenceError(
                f"the loss is not finite at step {self.state.global_step + 1}",
                "Lower the learning rate or the gradient's norm; the last checkpoint is finite.",
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the Trainer."""
        with preserved_generators():
            measured: dict[str, float] = super().evaluate(*args, **kwargs)
        return measured

    def has_posterior(self) -> bool:
        """Whether the model has MonteCLoRA adapters."""
        return isinstance(self.accelerator.unwrap_model(self.model), MonteCLoRAModel)

    def _accumulated_batches(self, num_items_in_batch: Tensor | int | None) -> int:
        """How many batches' losses are added up in a step; 1 where the Trainer divides by their number itself."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return int(getattr(self, "current_gradient_accumulation_steps", 1)) if scaled else 1

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in the Trainer, without rho and eta: the prior regularises them."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if ".posteriors." not in f".{name}"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the KL (nats) and E||pi||^2 of the last step to what is logged in training."""
        if "loss" in logs and self._regulariser is not None:
            logs["kl"] = self._regulariser.kl.item()
            logs["pi_squared_norm"] = self._regulariser.coop.item()
        super().log(logs, *args, **kwargs)


class _Batch(NamedTuple):
    """What a batch adds to its step: its rows, and its shares of the task's loss and of the objective (scalars)."""

    rows: Tensor
    task: Tensor
    objective: Tensor


class _TaskLossMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Keeps the task's part of a batch's loss.

    It stands behind the objective's mixin, which adds the regulariser to what this one returns.
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


class RunTrainer(CheckpointingMixin, _ObjectiveMixin, _TaskLossMixin, Trainer):
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
