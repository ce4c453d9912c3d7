"""(IA)^3 (Liu et al. 2022, arXiv 2205.05638): vectors that rescale keys, values, feed-forward parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from monteclora.errors import ConfigError
from monteclora.methods.adapters import AdapterMethod
from monteclora.methods.base import TaskKind
from monteclora.methods.lora import TargetFields, check_names, peft_task, put_adapter

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["IA3", "IA3Options"]


@dataclass(frozen=True)
class IA3Options(TargetFields):
    """The options of (IA)^3.

    Args:
        feedforward_modules: those of ``target_modules`` whose input is rescaled instead of their output; both are
            peft's choice for the architecture where ``target_modules`` is null.
    """

    name: Literal["ia3"] = "ia3"
    feedforward_modules: list[str] = field(default_factory=list)

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        found = super().problems()
        listed = self.target_modules if isinstance(self.target_modules, list) else []
        others = [name for name in self.feedforward_modules if name not in listed]
        if others:
            found.append(("feedforward_modules", f"names {others[0]}, which target_modules does not list"))
        return found


class IA3(AdapterMethod):
    """See :class:`~monteclora.methods.base.Method`."""

    name = "ia3"
    description = "(IA)^3: trained vectors that rescale keys, values and feed-forward activations"
    options = IA3Options
    peft_type = "IA3"

    def wrap(self, model: PreTrainedModel, options: IA3Options, task_kind: TaskKind, seed: int) -> nn.Module:
        """Put the vectors, all ones, on the model.

        Raises:
            ConfigError: an option names a layer that does not exist, or the architecture needs names.
        """
        import peft
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as CHOICES

        check_names(options, model)
        if options.target_modules is None and model.config.model_type not in CHOICES:
            raise ConfigError(
                f"method.target_modules is missing, and (IA)^3 has no choice for {model.config.model_type} models",
                "Name the key, value and second feed-forward layers, and the last in feedforward_modules.",
            )
        chosen = options.target_modules is not None
        return put_adapter(
            model,
            lambda: peft.IA3Config(
                task_type=peft_task(task_kind),
                target_modules=options.target_modules,
                # with none given peft takes its own choice for the architecture
                feedforward_modules=list(options.feedforward_modules) if chosen else None,
                **options.module_arguments(),
            ),
            seed,
        )
