"""The Trainer mixin: any ``transformers.Trainer`` trains MonteCLoRA adapters with the right objective.

What it changes, and nothing else:

- the regulariser is added once per optimiser step, to whatever loss the Trainer, trl or a subclass computes;
- where a sequence or token classification head of transformers ignores the number of items that the Trainer hands it,
  which multiplies its gradient by the number of accumulated batches, its loss is scaled to the whole step;
- rho and eta have a parameter group of their own, without weight decay;
- evaluation leaves the global generators as they were, so that how often it happens does not change dropout;
- a loss that is not finite ends training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer

from monteclora.adapters.active import active_posteriors, one_draw, regularisation
from monteclora.adapters.model import MonteCLoRAModel
from monteclora.errors import ConfigError, DivergenceError
from monteclora.posterior import Regulariser
from monteclora.system.randomness import preserved_generators
from monteclora.training.groups import separate_posterior
from monteclora.training.heads import ignores_count, is_library_head

__all__ = ["MonteCLoRATrainer", "MonteCLoRATrainerMixin"]


class MonteCLoRATrainerMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Put it in front of a Trainer class: ``class T(MonteCLoRATrainerMixin, SFTTrainer)``.

    Raises:
        ConfigError: where a subclass is defined with a Trainer class in front of the mixin; when a Trainer is made for
            a model without a MonteCLoRA adapter; in the first step, if the Trainer does not use the objective as the
            installed version of transformers was known to.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(MonteCLoRATrainerMixin):
            name = next(base.__name__ for base in cls.__bases__ if issubclass(base, Trainer))
            raise ConfigError(
                f"class {cls.__name__} has {name} in front of MonteCLoRATrainerMixin, which would then do nothing",
                f"Write class {cls.__name__}(MonteCLoRATrainerMixin, {name}).",
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _check_reference([*args, *kwargs.values()])
        super().__init__(*args, **kwargs)
        _carry_posterior(self.accelerator.unwrap_model(self.model))
        per_example = any(posterior.settings.noise == "per_example" for posterior in active_posteriors(self.model))
        if per_example and hasattr(self.args, "steps_per_generation"):
            raise ConfigError(
                f"{type(self).__name__} scores its completions in other batches than it generates them in, and with "
                "noise='per_example' each would have another draw there",
                "Use noise='shared'.",
            )
        self._regulariser: Regulariser | None = None
        self._objective: Tensor | None = None
        self._assumptions_hold = False
        self._head_ignores_count: bool | None = None
        self._batches = 0
        self._draw: int | None = None
        # on the instance, so that a subclass may override compute_loss without losing the regulariser
        self.__dict__["compute_loss"] = partial(self._compute_objective, self.compute_loss)

    # -- the objective ------------------------------------------------------------------------------------------------

    def _compute_objective(
        self,
        compute_loss: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """``compute_loss``, in training with this batch's share of the regulariser (docs/method.md section 4)."""
        result = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training:
            return result
        loss, *outputs = result if return_outputs else (result,)
        divides = self._divides(num_items_in_batch)
        added = regularisation(model)
        if added is not None:
            self._regulariser = added.first
            share = added.loss.to(loss.device)
            loss = loss + (share if divides else share / self._accumulated_batches)
        self._objective = loss.detach() / (self._accumulated_batches if divides else 1)
        return (loss, *outputs) if return_outputs else loss

    def _divides(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether ``Trainer.training_step`` divides the loss by the number of accumulated batches."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # since transformers 5.19
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return not scaled

    @property
    def _accumulated_batches(self) -> int:
        """The number of batches in the current step."""
        return int(getattr(self, "current_gradient_accumulation_steps", 1))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in the Trainer.

        Raises:
            DivergenceError: the loss is not finite; the weights have not taken it up.
            ConfigError: the Trainer made something else of the objective than the mixin expects.
        """
        self._objective = None
        if self._batches % self._batches_per_draw == 0:
            self._draw = None
        self._batches += 1
        with one_draw(self.model, self._draw) as self._draw:
            loss: Tensor = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise DivergenceError(
                f"the loss is not finite at step {self.state.global_step + 1}",
                "Lower the learning rate or the gradient's norm; the last checkpoint is finite.",
            )
        if not self._assumptions_hold:
            self._check_assumptions(loss)
        return loss

    @property
    def _batches_per_draw(self) -> int:
        """How many batches reuse what one draw of the policy has generated, in trl's GRPO and RLOO; else 1."""
        return int(getattr(self.args, "steps_per_generation", None) or 1) * int(getattr(self, "num_iterations", 1))

    def _check_assumptions(self, loss: Tensor) -> None:
        """Check that the step's loss is the objective, divided where :meth:`_divides` says so."""
        expected = self._objective
        if expected is None:
            problem = "training_step did not call compute_loss, so the regulariser is not in the loss"
        elif not torch.isclose(loss.float(), expected.mean().to(loss.device).float(), rtol=1e-3):
            problem = (
                f"training_step made {loss.item():.6g} of a loss that it was expected to make {expected.mean():.6g} of"
            )
        else:
            self._assumptions_hold = True
            return
        raise ConfigError(
            f"{type(self).__name__} with transformers {transformers.__version__}: {problem}",
            "Let training_step take its loss from self.compute_loss, and set loss_is_scaled_for_ga if that loss is "
            "scaled for gradient accumulation; or add monteclora.variational_loss in a loop of your own.",
        )

    # -- heads that ignore the number of items ------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss; that of a head which ignores ``num_items_in_batch`` is scaled to the whole step."""
        scale = self._share_of_items(model, inputs, num_items_in_batch)
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if scale is None:
            return result
        return (result[0] * scale, *result[1:]) if return_outputs else result * scale

    def _share_of_items(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor | None:
        """This batch's share of the step's labels, where the head takes the batch's mean regardless; else None.

        A batch that is the whole step needs no correction, so nothing is probed for it.
        """
        batches = self._accumulated_batches if model.training else 1
        if num_items_in_batch is None or "labels" not in inputs or batches * self.args.world_size == 1:
            return None
        if self._head_ignores_count is None:
            choices = (self.compute_loss_func, self.label_smoother, getattr(self, "loss_is_scaled_for_ga", None))
            default = getattr(super().compute_loss, "__func__", None) is Trainer.compute_loss and not any(
                choice is not None for choice in choices
            )
            head = self.accelerator.unwrap_model(self.model).get_base_model()
            self._head_ignores_count = default and is_library_head(head) and ignores_count(model, inputs)
        return inputs["labels"].ne(-100).sum() / num_items_in_batch if self._head_ignores_count else None

    # -- optimiser, evaluation, log -----------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer; rho and eta get a group of their own (also in an optimiser that was handed over)."""
        optimizer = super().create_optimizer(*args, **kwargs)
        # a scheduler that exists already knows only the groups that it was made for
        if self.lr_scheduler is None and isinstance(optimizer, torch.optim.Optimizer):
            separate_posterior(self.model, optimizer)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in the Trainer, without rho and eta: the prior regularises them."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if ".posteriors." not in f".{name}"]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the Trainer."""
        with preserved_generators():
            measured: dict[str, float] = super().evaluate(*args, **kwargs)
        return measured

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the KL (nats) and E||pi||^2 of the last step to what is logged in training."""
        if "loss" in logs and self._regulariser is not None:
            logs["posterior/kl"] = self._regulariser.kl.item()
            logs["posterior/pi_squared_norm"] = self._regulariser.coop.item()
        super().log(logs, *args, **kwargs)


class MonteCLoRATrainer(MonteCLoRATrainerMixin, Trainer):
    """``transformers.Trainer`` for MonteCLoRA adapters."""


def _check_reference(arguments: Sequence[Any]) -> None:
    """Refuse log-probabilities of a reference that are computed before there is a draw, where the draw matters.

    Raises:
        ConfigError: trl's ``precompute_ref_log_probs`` with an adapter whose lora_B is set.
    """
    if not any(a.precompute_ref_log_probs for a in arguments if hasattr(a, "precompute_ref_log_probs")):
        return
    for model in (a for a in arguments if isinstance(a, MonteCLoRAModel)):
        trained = any(bool(p.any()) for name, p in model.named_parameters() if ".lora_B." in name)
        if trained and any(posterior.enabled for posterior in active_posteriors(model)):
            raise ConfigError(
                "precompute_ref_log_probs=True compares a drawn policy with a reference that has no draw, and the "
                "adapter has been trained already, so that they differ from the start",
                "Leave it out: policy and reference then have the same draw in every batch.",
            )


def _carry_posterior(model: Any) -> None:
    """Give the frozen copy of the policy that trl makes, an adapter named ``ref``, the policy's posterior too.

    trl copies adapter weights by name. An adapter of that name which is no copy keeps its posterior.
    """
    if not isinstance(model, MonteCLoRAModel):
        return
    policy, reference = (model.base_model.posterior(name) for name in ("default", "ref"))
    if policy is None or reference is None:
        return
    weights = [(name, p) for name, p in model.named_parameters() if ".lora_" in name and ".default." in name]
    if all(torch.equal(p, model.get_parameter(name.replace(".default.", ".ref."))) for name, p in weights):
        reference.load_state_dict(policy.state_dict())
        reference.seed = policy.seed
