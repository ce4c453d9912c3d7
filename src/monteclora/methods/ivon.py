"""IVON (Shen et al. 2024, arXiv 2402.17641; for LoRA: Cong et al. 2024, arXiv 2411.04421): variational learning.

The optimiser keeps a Gaussian over the trained weights: every step computes its gradient at a draw from it. ivon-opt
is under the GPL, so that it is neither a requirement nor copied: it is imported where the method is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
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
        hess_init: initial curvature. A step divides the gradient by it: a small one wants a ``clip_radius`` and many
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
        options: IvonOptions = plan.options
        made: Optimizer = _optimizer_class()(
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

    @contextmanager
    def gradient_context(self, optimizer: Any) -> Iterator[None]:
        """The weights at a draw, their mean afterwards."""
        own = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's
        with own.at_a_draw():
            yield

    def kept_whole(self, model: nn.Module) -> list[nn.Module]:
        """Raises ConfigError: the optimiser flattens all weights into one vector."""
        raise ConfigError("method ivon cannot be sharded by FSDP", "Launch it without --use_fsdp.")

    def extra_memory(self, model: nn.Module, options: Any) -> int:
        """Mean, noise, and averages of the gradient and of its product with the noise, float32."""
        return 4 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


@cache
def _optimizer_class() -> Any:
    """ivon's optimiser with what a run asks of one: its noise is its own, and its state is saved and put back."""
    import ivon
    import torch

    from monteclora.system.randomness import preserved_generators

    # two names of ivon are private, and have no public counterpart: _device, where it draws its noise, and
    # _reset_samples, which forgets the gradients of a step that is not made. tests/methods/test_ivon.py checks both
    class Optimizer(ivon.IVON):
        def __init__(self, groups: list[dict[str, Any]], seed: int, **options: Any) -> None:
            self._seed = seed
            self._device: torch.device  # ivon's own, of its noise
            super().__init__(groups, **options)

        @contextmanager
        def at_a_draw(self) -> Iterator[None]:
            """The same draw on every process, in every way to divide the batch, and after every resumption.

            Whatever ends the block, the weights are at their mean again. One without a gradient has one of zero.
            """
            self._follow()
            self._reset_samples()  # of a step that fp16 passed over
            weights = [p for group in self.param_groups for p in group["params"]]
            means = [p.data for p in weights]
            drawn = self.sampled_params(train=True)
            with preserved_generators():
                torch.manual_seed((self._seed * 1_000_003 + self.current_step) % 2**63)
                drawn.__enter__()
            try:
                yield
            except BaseException:
                for p, mean in zip(weights, means, strict=True):
                    p.data = mean
                raise
            for p in weights:  # those that no batch reached, whose gradient ivon asks for
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
            drawn.__exit__(None, None, None)

        def _follow(self) -> None:
            """Keep the state where the weights are, which move after the optimiser is made."""
            device = self.param_groups[0]["params"][0].device
            if self._device != device:
                self._device = device
                for group in self.param_groups:
                    group["momentum"], group["hess"] = group["momentum"].to(device), group["hess"].to(device)

        def step(self, closure: Any = None) -> Any:
            """Pass over a step whose gradients were taken away."""
            if all(p.grad is None for group in self.param_groups for p in group["params"]):
                self._reset_samples()
                return None
            return super().step(closure)

        def state_dict(self) -> dict[str, Any]:
            """Momentum and curvature are in ivon's groups, and the number of steps nowhere: here all are state."""
            groups, state, first = [], {}, 0
            for number, group in enumerate(self.param_groups):
                count = len(group["params"])
                kept = {name: value for name, value in group.items() if name not in ("params", "momentum", "hess")}
                groups.append({**kept, "params": list(range(first, first + count))})
                state[number] = {
                    "momentum": group["momentum"],
                    "hess": group["hess"],
                    "step": torch.tensor(self.current_step),
                }
                first += count
            return {"state": state, "param_groups": groups}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """What :meth:`state_dict` gave, in place."""
            for number, group in enumerate(self.param_groups):
                saved = state_dict["state"][number]
                for name in ("momentum", "hess"):
                    group[name].copy_(saved[name])
                self.current_step = int(saved["step"])

    return Optimizer
