"""What methods that are adapters of peft have in common: how they are saved, loaded and merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from monteclora.errors import CheckpointError
from monteclora.methods.base import Method

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RESTORE", "AdapterMethod"]

RESTORE = "Take the folder from a backup, or remove it and run `monteclora train` again."


class AdapterMethod(Method):
    """A method whose trained weights are an adapter of peft.

    Attributes:
        peft_type: as ``adapter_config.json`` names the kind of adapter.
    """

    peft_type: str = "LORA"
    takes_laplace = True

    def save(self, model: Any, folder: Path) -> None:
        """As ``save_pretrained`` writes it, without a model card."""
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)

    def load(self, model: Any, folder: Path) -> None:
        """See :class:`~monteclora.methods.base.Method`."""
        import safetensors

        from monteclora.adapters.checks import check_adapter, check_finite
        from monteclora.adapters.storage import WEIGHTS_FILE

        check_adapter(folder, kind=self.peft_type)
        trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        try:
            _check_names(model, folder / WEIGHTS_FILE)
            self.load_weights(model, folder)
        except (OSError, LookupError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE} cannot be loaded into the model: {reason[:200]}", RESTORE
            ) from error
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        check_finite(folder, {name: p for name, p in model.named_parameters() if p.requires_grad})

    def load_weights(self, model: Any, folder: Path) -> None:
        """Put the adapter's checked weights into the model."""
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True)

    def merge(self, model: nn.Module) -> nn.Module:
        """See :class:`~monteclora.methods.base.Method`."""
        from monteclora.adapters.merging import merged_copy

        return merged_copy(cast(Any, model))


def _check_names(model: Any, file: Path) -> None:
    """peft skips names that one side lacks, with a warning."""
    import safetensors
    from peft.utils import get_peft_model_state_dict

    expected: Sequence[str] = list(
        get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    )
    with safetensors.safe_open(file, framework="pt") as weights:
        differing = sorted(set(weights.keys()) ^ set(expected))
    if differing:
        raise CheckpointError(
            f"{file} does not fit the recipe: {len(differing)} weights are on one side only, as {differing[0]}", RESTORE
        )
