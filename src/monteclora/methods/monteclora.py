"""MonteCLoRA (Seth et al. 2025): LoRA whose A is drawn from a learned posterior in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_type_hints

from monteclora.methods.base import Method, TaskKind
from monteclora.methods.lora import LoRAFields, check_names, lora_arguments, seed_everything
from monteclora.posterior.settings import PosteriorSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["METHOD", "MonteCLoRAOptions", "wrap"]


def _with_posterior_settings(options: type) -> type:
    """Add the fields of ``PosteriorSettings``, which are declared there alone."""
    hints = get_type_hints(PosteriorSettings)
    for field in fields(PosteriorSettings):
        options.__annotations__[field.name] = hints[field.name]
        setattr(options, field.name, field.default)
    return options


@dataclass(frozen=True)
@_with_posterior_settings
class MonteCLoRAOptions(LoRAFields):
    """LoRA's options and those of :class:`~monteclora.posterior.settings.PosteriorSettings`."""

    renamed: ClassVar[Mapping[str, str]] = {"num_samples": "num_components"}

    name: Literal["monteclora"] = "monteclora"

    def settings(self) -> PosteriorSettings:
        """The options that LoRA does not have."""
        return PosteriorSettings(**{field.name: getattr(self, field.name) for field in fields(PosteriorSettings)})

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        return super().problems() + self.settings().option_problems()

    def resolved(self) -> Self:
        """With the values that ``fidelity`` decides."""
        return replace(self, **self.settings().resolved().given())


def wrap(model: PreTrainedModel, options: MonteCLoRAOptions, task_kind: TaskKind, seed: int) -> PeftModel:
    """See :class:`~monteclora.methods.base.Method`; the noise stream has the same seed.

    Raises:
        ConfigError: an option names a layer that does not exist or that cannot be drawn.
    """
    from monteclora.adapters.config import MonteCLoRAConfig
    from monteclora.adapters.model import get_peft_model

    check_names(options, model)
    arguments = lora_arguments(options, model, task_kind) | options.settings().given()
    config = MonteCLoRAConfig(**arguments, noise_seed=seed)
    seed_everything(seed)
    return get_peft_model(model, config)


METHOD = Method(
    name="monteclora",
    description="Bayesian LoRA: A is drawn from a learned mixture of Gaussians while training",
    options=MonteCLoRAOptions,
    wrap=wrap,
    has_posterior=True,
)
