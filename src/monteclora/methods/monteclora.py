"""MonteCLoRA (Seth et al. 2025): LoRA whose A is drawn from a learned posterior in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from monteclora.errors import ConfigError
from monteclora.methods.base import Method, TaskKind
from monteclora.methods.lora import LoRAFields, check_names, lora_arguments, seed_everything

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["METHOD", "MonteCLoRAOptions", "wrap"]


@dataclass(frozen=True)
class MonteCLoRAOptions(LoRAFields):
    """LoRA's options and the method's own, with the meaning they have in ``monteclora.MonteCLoRAConfig``.

    Args:
        num_components: N, the number of mixture components.
        sample_scale: eps: an absolute number, or ``relative:c`` for c times the size of each layer's initial A.
        kl_weight: weight of the KL terms.
        coop_weight: weight of the cooperative loss.
        covariance: the form of Sigma.
        dirichlet: the law of the mixture weights.
        regulariser: whether the objective takes expectations or the values of the draw.
        noise: one draw for the batch, or signs of its own for every example (flipout).
        alpha_prior: concentration of the Dirichlet prior.
        degrees_of_freedom: of the Wishart law; null is each layer's rank.
        normalised: whether E[Sigma] does not depend on the rank.
        fidelity: ``paper`` takes the published defaults.
    """

    renamed: ClassVar[Mapping[str, str]] = {"num_samples": "num_components"}

    name: Literal["monteclora"] = "monteclora"
    num_components: int = 4
    sample_scale: float | str | None = None
    kl_weight: float = 1e-5
    coop_weight: float = 1.0
    covariance: Literal["diagonal", "full"] = "diagonal"
    dirichlet: Literal["exact", "laplace"] = "exact"
    regulariser: Literal["expected", "sampled"] | None = None
    noise: Literal["shared", "per_example"] = "shared"
    alpha_prior: float = 1.0
    degrees_of_freedom: float | None = None
    normalised: bool | None = None
    fidelity: Literal["default", "paper"] = "default"

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, LoRA's and those that ``MonteCLoRAConfig`` refuses."""
        from monteclora.adapters.config import MonteCLoRAConfig

        found = super().problems()
        try:
            MonteCLoRAConfig(**self.method_arguments())
        except ConfigError as error:
            name, _, rest = error.message.partition(" ")
            found.append((name, rest))
        return found

    def resolved(self) -> Self:
        """With the values that ``fidelity`` decides."""
        from monteclora.adapters.config import MonteCLoRAConfig

        config = MonteCLoRAConfig(**self.method_arguments())
        return replace(
            self,
            sample_scale=config.sample_scale,
            regulariser=config.regulariser,
            normalised=config.normalised,
        )

    def method_arguments(self) -> dict[str, Any]:
        """The fields that LoRA does not have."""
        shared = {field.name for field in fields(LoRAFields)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in shared}


def wrap(model: PreTrainedModel, options: MonteCLoRAOptions, task_kind: TaskKind, seed: int) -> PeftModel:
    """See :class:`~monteclora.methods.base.Method`; the noise stream has the same seed.

    Raises:
        ConfigError: an option names a layer that does not exist or that cannot be drawn.
    """
    from monteclora.adapters.config import MonteCLoRAConfig
    from monteclora.adapters.model import get_peft_model

    check_names(options, model)
    arguments = lora_arguments(options, model, task_kind) | options.method_arguments()
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
