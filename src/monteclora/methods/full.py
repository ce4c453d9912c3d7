"""Full fine-tuning: every weight of the model is trained."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from monteclora.errors import CheckpointError, ConfigError
from monteclora.methods.base import Method, MethodOptions, TaskKind
from monteclora.methods.lora import seed_everything

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["FullFineTuning", "FullOptions"]

_WEIGHTS = "model.safetensors"
_RESTORE = "Take the folder from a backup, or remove it and run `monteclora train` again."


@dataclass(frozen=True)
class FullOptions(MethodOptions):
    """Full fine-tuning has no options."""

    name: Literal["full"] = "full"


class FullFineTuning(Method):
    """See :class:`~monteclora.methods.base.Method`."""

    name = "full"
    description = "full fine-tuning: every weight of the model is trained"
    options = FullOptions

    def wrap(self, model: PreTrainedModel, options: Any, task_kind: TaskKind, seed: int) -> nn.Module:
        """Leave the model as it is, every weight trained.

        Raises:
            ConfigError: the weights are quantised.
        """
        if getattr(model, "is_quantized", False):
            raise ConfigError(
                "method full trains every weight, and quantised weights cannot be trained",
                "Set model.quantization to none, or choose an adapter method.",
            )
        seed_everything(seed)
        trained: nn.Module = model.requires_grad_(True)
        return trained

    def save(self, model: Any, folder: Path) -> None:
        """An ordinary transformers folder, in one file whatever its size."""
        model.save_pretrained(str(folder), max_shard_size="1000GB")

    def load(self, model: nn.Module, folder: Path) -> None:
        """See :class:`~monteclora.methods.base.Method`."""
        import safetensors
        from safetensors.torch import load_model

        from monteclora.adapters.checks import check_finite

        path = folder / _WEIGHTS
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {_WEIGHTS}", _RESTORE)
        try:
            load_model(model, path)
        except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path} cannot be loaded into the model: {reason[:200]}", _RESTORE) from error
        check_finite(folder, dict(model.named_parameters()))

    def merge(self, model: nn.Module) -> nn.Module:
        """A copy: the weights are in the model already."""
        return copy.deepcopy(model)
