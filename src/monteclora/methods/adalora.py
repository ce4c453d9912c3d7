"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): a singular value decomposition whose ranks are pruned in training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from monteclora.errors import CheckpointError, ConfigError
from monteclora.methods.adapters import RESTORE, AdapterMethod
from monteclora.methods.base import Added, Plan, TaskKind
from monteclora.methods.lora import TargetFields, check_names, peft_task, put_adapter

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["AdaLoRA", "AdaLoRAOptions"]

_STATE = "allocation.safetensors"
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


@dataclass(frozen=True)
class AdaLoRAOptions(TargetFields):
    """The options of AdaLoRA.

    Args:
        init_r: the rank that every layer begins with.
        target_r: the average rank that is left.
        lora_alpha: the update is scaled by ``lora_alpha / init_r``.
        lora_dropout: the share of the adapter's inputs set to zero in training.
        tinit: steps before the pruning begins; null is a tenth of the run.
        tfinal: steps after it has ended; null is three tenths of the run.
        delta_t: steps from one pruning to the next; null is a hundredth of the run, at least 1.
        beta1, beta2: averages of each weight's sensitivity and of its uncertainty.
        orthogonality_weight: of the regulariser that keeps the singular vectors orthogonal.
    """

    name: Literal["adalora"] = "adalora"
    init_r: int = 12
    target_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    tinit: int | None = None
    tfinal: int | None = None
    delta_t: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality_weight: float = 0.5

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        least = {"target_r": 1, "lora_alpha": 1, "tinit": 0, "tfinal": 0, "delta_t": 1, "orthogonality_weight": 0}
        found = super().problems() + [
            (name, f"is {getattr(self, name)}, expected at least {bound}")
            for name, bound in least.items()
            if getattr(self, name) is not None and getattr(self, name) < bound
        ]
        if self.init_r <= self.target_r:
            found.append(("init_r", f"is {self.init_r}, expected more than target_r, which is {self.target_r}"))
        if not 0 <= self.lora_dropout < 1:
            found.append(("lora_dropout", f"is {self.lora_dropout}, expected at least 0 and below 1"))
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                found.append((name, f"is {getattr(self, name)}, expected above 0 and below 1"))
        return found

    def schedule(self, steps: int) -> tuple[int, int, int]:
        """``tinit``, ``tfinal`` and ``delta_t`` of a run of this many steps.

        Raises:
            ConfigError: they leave no step to prune in.
        """
        tinit = steps // 10 if self.tinit is None else self.tinit
        tfinal = 3 * steps // 10 if self.tfinal is None else self.tfinal
        if tinit >= steps - tfinal:
            raise ConfigError(
                f"method.tinit {tinit} and method.tfinal {tfinal} leave none of {steps} steps to prune ranks in",
                "Lower one of them, or train longer.",
            )
        return tinit, tfinal, max(steps // 100, 1) if self.delta_t is None else self.delta_t


class AdaLoRA(AdapterMethod):
    """See :class:`~monteclora.methods.base.Method`.

    Pruned ranks stay in the model with a singular value of zero, in training and on disk: the layers keep their shapes.
    """

    name = "adalora"
    description = "LoRA as a singular value decomposition whose ranks are pruned where they matter least"
    options = AdaLoRAOptions
    peft_type = "ADALORA"

    def wrap(self, model: PreTrainedModel, options: AdaLoRAOptions, task_kind: TaskKind, seed: int) -> nn.Module:
        """Put the adapter on the model.

        Raises:
            ConfigError: an option names a layer that does not exist or that cannot be adapted.
        """
        import peft
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING as CHOICES

        check_names(options, model)
        wrapped = put_adapter(
            model,
            lambda: peft.AdaLoraConfig(
                task_type=peft_task(task_kind),
                init_r=options.init_r,
                target_r=options.target_r,
                lora_alpha=options.lora_alpha,
                lora_dropout=options.lora_dropout,
                target_modules=options.targets(model, CHOICES),
                beta1=options.beta1,
                beta2=options.beta2,
                total_step=1,  # begin_phase() has the real schedule
                orth_reg_weight=0.0,  # else peft adds it to the task's loss, and only where the model computes that
                **options.module_arguments(),
            ),
            seed,
        )
        for name, parameter in wrapped.named_parameters():
            if ".ranknum." in name:  # a constant, which peft counts as trained where a model has no weights
                parameter.requires_grad_(False)
        return wrapped

    def begin_phase(self, model: Any, plan: Plan) -> None:
        """Set the schedule. Raises ConfigError where it leaves nothing to prune in."""
        config = _config(model)
        config.tinit, config.tfinal, config.deltaT = plan.options.schedule(plan.steps)
        config.total_step = plan.steps
        model.base_model.orthogonality_weight = plan.options.orthogonality_weight

    def added_loss(self, model: Any) -> Added | None:
        """The regulariser that keeps P and Q near orthogonal, weighted.

        The paper (section 3.1) has ``R(P, Q) = ||P^T P - I||_F^2 + ||Q Q^T - I||_F^2``, with P of shape (m, r), peft's
        ``lora_B``, and Q of shape (r, n), its ``lora_A``. As in peft's ``AdaLoraModel`` the norms are not squared, and
        it is their mean over the matrices of all layers rather than the sum.
        """
        import torch

        if not model.base_model.orthogonality_weight:
            return None
        norms = []
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                product = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
                norms.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        mean = torch.stack(norms).mean()
        return Added(model.base_model.orthogonality_weight * mean, {"orthogonality": mean.detach()})

    def after_step(self, model: Any, step: int, steps: int) -> None:
        """Prune, where the schedule says so.

        The last pruning is made up for when its step was skipped because it was not finite.
        """
        config, allocator = _config(model), model.base_model.rankallocator
        last = steps - config.tfinal
        if step > last and allocator.exp_avg_ipt:  # which the last pruning empties
            step = last
        if step < last or allocator.exp_avg_ipt or config.rank_pattern is not None:
            model.base_model.update_and_allocate(step)

    def kept_whole(self, model: nn.Module) -> list[nn.Module]:
        """Raises ConfigError: importances are compared over all layers, which no process has whole."""
        raise ConfigError("method adalora cannot be sharded by FSDP", "Launch it without --use_fsdp.")

    def extra_memory(self, model: nn.Module, options: Any) -> int:
        """Sensitivity and its two averages for each weight of the adapter, float32."""
        return 3 * 4 * sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)

    def save(self, model: Any, folder: Path) -> None:
        """A plain AdaLoRA adapter of peft, and the averages that the pruning goes by."""
        import torch
        from safetensors.torch import save_file

        config, allocator = _config(model), model.base_model.rankallocator
        pattern, config.rank_pattern = config.rank_pattern, None  # with it, peft would save the remaining ranks alone
        try:
            super().save(model, folder)
        finally:
            config.rank_pattern = pattern
        tensors = {
            f"{part}/{name}": t.contiguous() for part in _AVERAGES for name, t in getattr(allocator, part).items()
        }
        tensors |= {f"kept/{name}": torch.tensor(kept) for name, kept in (pattern or {}).items()}
        save_file(tensors, folder / _STATE)

    def load(self, model: Any, folder: Path) -> None:
        """As for every adapter; the averages must be beside it."""
        import safetensors
        import torch
        from safetensors.torch import load_file

        super().load(model, folder)
        path = folder / _STATE
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {_STATE}", RESTORE)
        try:
            tensors = load_file(path, device=str(model.device))
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__})", RESTORE) from error
        allocator = model.base_model.rankallocator
        allocator.reset_ipt()
        for part in _AVERAGES:
            values = {key.partition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{part}/")}
            setattr(allocator, part, values)
        allocator.ipt = {name: torch.zeros_like(t) for name, t in allocator.exp_avg_ipt.items()}
        kept = {key.partition("/")[2]: t.tolist() for key, t in tensors.items() if key.startswith("kept/")}
        _config(model).rank_pattern = kept or None

    def load_weights(self, model: Any, folder: Path) -> None:
        """peft would make a second adapter of the same name, and refuses two that are trained."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        from monteclora.adapters.storage import WEIGHTS_FILE

        _config(model).rank_pattern = None
        weights = load_file(folder / WEIGHTS_FILE)
        set_peft_model_state_dict(model, weights, model.active_adapter)


def _config(model: Any) -> Any:
    return model.peft_config[model.active_adapter]
