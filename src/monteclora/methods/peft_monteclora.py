"""peft's own MonteCLoRA variant, trained as peft's documentation says, for comparison; its defects are left in.

docs/methods.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from monteclora.errors import CheckpointError, ConfigError
from monteclora.methods.adapters import RESTORE
from monteclora.methods.base import Added
from monteclora.methods.lora import LoRAFields, LoRAMethod

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PeftMonteCLoRA", "PeftMonteCLoRAOptions"]

_BUFFERS = "noise_buffers.safetensors"


@dataclass(frozen=True)
class PeftMonteCLoRAOptions(LoRAFields):
    """LoRA's options and those of ``peft.tuners.lora.config.MontecloraConfig``, with its names and defaults.

    Args:
        num_samples: components of the mixture.
        use_entropy: whether the squared norm of the mixture's weights is added to the loss.
        dirichlet_prior: concentration of the prior of the mixture's weights.
        sample_scaler: scale of the noise.
        kl_loss_weight: of the divergences from the priors.
        buffer_size: draws that are made, and kept, at once.
    """

    name: Literal["peft_monteclora"] = "peft_monteclora"
    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        found = super().problems()
        found += [
            (name, f"is {getattr(self, name)}, expected at least 1")
            for name in ("num_samples", "buffer_size")
            if getattr(self, name) < 1
        ]
        if self.dirichlet_prior <= 0:
            found.append(("dirichlet_prior", f"is {self.dirichlet_prior}, expected above 0"))
        found += [
            (name, f"is {getattr(self, name)}, expected at least 0")
            for name in ("sample_scaler", "kl_loss_weight")
            if getattr(self, name) < 0
        ]
        return found


class PeftMonteCLoRA(LoRAMethod):
    """See :class:`~monteclora.methods.base.Method`. It predicts at the mean: peft's variant draws in training alone."""

    name = "peft_monteclora"
    description = "peft's own MonteCLoRA variant, its defects left in, for comparison"
    options = PeftMonteCLoRAOptions
    takes_laplace = False  # what its draws are trained with has no effect at the mean

    def arguments(self, options: PeftMonteCLoRAOptions) -> dict[str, Any]:
        """As in the base class."""
        from peft.tuners.lora import MontecloraConfig

        names = ("num_samples", "use_entropy", "dirichlet_prior", "sample_scaler", "kl_loss_weight", "buffer_size")
        return {"monteclora_config": MontecloraConfig(**{name: getattr(options, name) for name in names})}

    def wrap(self, model: Any, options: Any, task_kind: Any, seed: int) -> nn.Module:
        """As in the base class; on quantised layers peft silently leaves its variant out.

        Raises:
            ConfigError: also where the weights are quantised.
        """
        if getattr(model, "is_quantized", False):
            raise ConfigError(
                "method peft_monteclora would be plain LoRA on quantised layers: peft has no variant for them",
                "Set model.quantization to none, or choose the method monteclora.",
            )
        wrapped = super().wrap(model, options, task_kind, seed)
        for layer in _layers(wrapped):
            if not layer.lora_monteclora_sampler:  # a model without weights, for which peft puts it off
                _count_in(layer, options)
        return wrapped

    def added_loss(self, model: Any) -> Added | None:
        """The mean over layers of the weighted divergences and of the entropy term."""
        from monteclora.adapters.peft_private import monteclora_loss

        loss = monteclora_loss(model.base_model)
        return Added(loss, {"regulariser": loss.detach()})

    def extra_memory(self, model: nn.Module, options: PeftMonteCLoRAOptions) -> int:
        """The buffers of draws, float32."""
        shapes = [next(iter(layer.lora_A.values())).weight.shape for layer in _layers(model)]
        draws = options.buffer_size * options.num_samples
        return sum(4 * draws * (r * n + 1) + 4 * options.buffer_size * r * r for r, n in shapes)

    def save(self, model: Any, folder: Path) -> None:
        """As for every adapter; the draws that are left, without which a resumed run would be another one."""
        import torch
        from safetensors.torch import save_file

        super().save(model, folder)
        tensors = {}
        for name, sampler in _samplers(model):
            for part in sampler.buffer[0]:
                left = [draw[part] for draw in sampler.buffer[sampler.index :]]
                empty = sampler.buffer[0][part].new_empty(0)
                tensors[f"{name}/{part}"] = torch.stack(left) if left else empty
        save_file(tensors, folder / _BUFFERS)

    def load(self, model: Any, folder: Path) -> None:
        """As for every adapter; the draws must be beside it."""
        import safetensors
        from safetensors.torch import load_file

        super().load(model, folder)
        path = folder / _BUFFERS
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {_BUFFERS}", RESTORE)
        try:
            tensors = load_file(path)
            for name, sampler in _samplers(model):
                parts = list(sampler.buffer[0])
                draws = zip(*(tensors[f"{name}/{part}"] for part in parts), strict=True)
                left = [dict(zip(parts, draw, strict=True)) for draw in draws]
                unused = sampler.buffer_size - len(left)
                sampler.buffer, sampler.index = [*sampler.buffer[:unused], *left], unused
        except (OSError, LookupError, ValueError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__})", RESTORE) from error

    def kept_whole(self, model: nn.Module) -> list[nn.Module]:
        """Raises ConfigError: peft's samplers draw by whole matrices."""
        raise ConfigError("method peft_monteclora cannot be sharded by FSDP", "Launch it without --use_fsdp.")


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "lora_monteclora_sampler"))


def _count_in(layer: Any, options: PeftMonteCLoRAOptions) -> None:
    """Give a layer without weights the parameters that its sampler will have, to be counted."""
    from peft.tuners.lora.monteclora import MontecloraSampler

    for name, lora_a in layer.lora_A.items():
        sampler = MontecloraSampler(1, lora_a.out_features, options.num_samples, buffer_size=1, device="cpu")
        layer.lora_monteclora_sampler[name] = sampler


def _samplers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The buffered sampler of each layer, by name."""
    for name, module in model.named_modules():
        for sampler in getattr(module, "lora_monteclora_sampler", {}).values():
            yield name, sampler.sampler
