"""IVON (Shen et al. 2024, arXiv 2402.17641; for LoRA: Cong et al. 2024, arXiv 2411.04421): variational learning.

The optimiser keeps a Gaussian over the trained weights: every step computes its gradient at a draw from it. ivon-opt
is under the GPL, so that it is neither a requirement nor copied: it is imported where the method is used.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from monteclora.errors import ConfigError
from monteclora.methods.base import Plan, TaskKind
from monteclora.methods.lora import LoRAFields, LoRAMethod

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

__all__ = ["Ivon", "IvonOptions"]


@dataclass(frozen=True)
class IvonOptions(LoRAFields):
    """LoRA's options, and those of the optimiser. ``training.learning_rate`` is its own: 0.1 to 1 with this curvature.

    Args:
        effective_sample_size: the larger, the narrower the Gaussian.
        hess_init: initial curvature. A step divides the gradient by it: a small one needs a ``clip_radius`` and many
            steps. The variance of a weight is 1 / (effective_sample_size * (curvature + training.weight_decay)).
        beta1, beta2: averages of gradient and curvature.
        clip_radius: no weight moves by more than this times the learning rate; null for no limit.
    """

    name: Literal["ivon"] = "ivon"
    effective_sample_size: float = 1e6
    hess_init: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99999
    clip_radius: float | None = None

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        found = super().problems() + [
            (name, f"is {getattr(self, name)}, expected above 0")
            for name in ("effective_sample_size", "hess_init", "clip_radius")
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        found += [
            (name, f"is {getattr(self, name)}, expected at least 0 and below 1")
            for name in ("beta1", "beta2")
            if not 0 <= getattr(self, name) < 1
        ]
        return found


class Ivon(LoRAMethod):
    """See :class:`~monteclora.methods.base.Method`. It predicts at the mean of the Gaussian, a plain LoRA."""

    name = "ivon"
    description = "LoRA trained by IVON, an optimiser that learns a Gaussian over the weights (pip install ivon-opt)"
    options = IvonOptions

    def wrap(self, model: PreTrainedModel, options: IvonOptions, task_kind: TaskKind, seed: int) -> nn.Module:
        """As in the base class.

        Raises:
            ConfigError: also where ivon-opt is missing.
        """
        if importlib.util.find_spec("ivon") is None:
            raise ConfigError("method ivon needs ivon-opt", "Run `pip install 'monteclora[ivon]'`.")
        return super().wrap(model, options, task_kind, seed)

    def optimizer(self, groups: list[dict[str, Any]], plan: Plan) -> Optimizer:
        """IVON on the groups that have parameters."""
        from monteclora.methods.ivon_optimizer import IvonOptimizer

        options: IvonOptions = plan.options
        made: Optimizer = IvonOptimizer(
            [group for group in groups if group["params"]],
            plan.seed,
            lr=plan.learning_rate,
            ess=options.effective_sample_size,
            hess_init=options.hess_init,
            beta1=options.beta1,
            beta2=options.beta2,
            clip_radius=float("inf") if options.clip_radius is None else options.clip_radius,
        )
        return made

    def gradient_context(self, optimizer: Any) -> AbstractContextManager[None]:
        """The weights at a draw, their mean afterwards."""
        context: AbstractContextManager[None] = optimizer.at_a_draw()
        return context

    def kept_whole(self, model: nn.Module) -> list[nn.Module]:
        """Raises ConfigError: the optimiser flattens all weights into one vector."""
        raise ConfigError("method ivon cannot be sharded by FSDP", "Launch it without --use_fsdp.")

    def extra_memory(self, model: nn.Module, options: Any) -> int:
        """Mean, noise, and averages of the gradient and of its product with the noise, float32."""
        return 4 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
