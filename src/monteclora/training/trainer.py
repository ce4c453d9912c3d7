"""The Trainer mixin: any ``transformers.Trainer`` trains MonteCLoRA adapters with the right objective.

What it changes, and nothing else: the regulariser is added once for each optimiser step, however many batches are
accumulated in it; the loss of sequence and token classification is normalised by the examples of the whole
accumulated batch (several heads ignore the count that transformers hands them, which multiplies their gradient by the
number of accumulated batches); rho and eta are exempt from weight decay; evaluation leaves the global generators as
they were, so that how often it happens does not change dropout; and a loss that is not finite ends training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from monteclora.adapters.model import MonteCLoRAModel, active_posteriors, regularisers
from monteclora.errors import DivergenceError
from monteclora.posterior import Regulariser
from monteclora.system.randomness import preserved_generators

__all__ = ["MonteCLoRATrainer", "MonteCLoRATrainerMixin", "classification_loss"]

_CLASSIFIERS = {
    *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
}


def classification_loss(config: Any) -> Callable[..., Tensor]:
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


class MonteCLoRATrainerMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Put it in front of a Trainer class: ``class T(MonteCLoRATrainerMixin, SFTTrainer)``.

    A model without MonteCLoRA adapters trains as with the Trainer alone, except for the classification loss.
    """

    compute_loss_func: Callable[..., Any] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self.compute_loss_func is None and self.label_smoother is None and type(base).__name__ in _CLASSIFIERS:
            self.compute_loss_func = classification_loss(base.config)
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


class MonteCLoRATrainer(MonteCLoRATrainerMixin, Trainer):
    """``transformers.Trainer`` for MonteCLoRA adapters."""
