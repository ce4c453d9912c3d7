"""MonteCLoRA (Seth et al. 2025): LoRA whose A is drawn from a learned posterior in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from monteclora.errors import CheckpointError, ConfigError
from monteclora.methods.adapters import RESTORE, AdapterMethod
from monteclora.methods.base import Added, PhaseName, TaskKind
from monteclora.methods.lora import LoRAFields, check_names, lora_arguments, seed_everything

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["MonteCLoRA", "MonteCLoRAOptions"]


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


class MonteCLoRA(AdapterMethod):
    """See :class:`~monteclora.methods.base.Method`."""

    name = "monteclora"
    description = "Bayesian LoRA: A is drawn from a learned mixture of Gaussians while training"
    options = MonteCLoRAOptions
    has_posterior = True

    def wrap(self, model: PreTrainedModel, options: MonteCLoRAOptions, task_kind: TaskKind, seed: int) -> nn.Module:
        """Put a MonteCLoRA adapter on the model; the noise stream has the same seed.

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

    def begin_phase(self, model: nn.Module, phase: PhaseName) -> None:
        """The phases of docs/method.md section 6."""
        from monteclora.adapters.model import active_posteriors, train_posterior_only

        if phase == "posterior":
            train_posterior_only(model)
            return
        for posterior in active_posteriors(model):
            posterior.enabled = phase == "cooperative"
            posterior.requires_grad_(posterior.enabled)

    def decays(self, name: str) -> bool:
        """As in the base class; rho and eta are regularised by their prior instead."""
        return super().decays(name) and ".posteriors." not in f".{name}"

    def added_loss(self, model: nn.Module) -> Added | None:
        """The regulariser, docs/method.md section 4."""
        import torch

        from monteclora.adapters.model import active_posteriors

        parts = [posterior.regulariser() for posterior in active_posteriors(model) if posterior.enabled]
        if not parts:
            return None
        numbers = {"kl": parts[0].kl.detach(), "pi_squared_norm": parts[0].coop.detach()}
        return Added(torch.stack([part.loss for part in parts]).sum(), numbers)

    def kept_whole(self, model: nn.Module) -> list[nn.Module]:
        """Rho and eta: the draws of all layers are made of them before the first block runs."""
        from monteclora.adapters.model import active_posteriors

        return list(active_posteriors(model))

    def load(self, model: nn.Module, folder: Path) -> None:
        """As for every adapter; the posterior must be beside it."""
        from monteclora.adapters.storage import POSTERIOR_FILE

        super().load(model, folder)
        if not (folder / POSTERIOR_FILE).is_file():
            raise CheckpointError(f"{folder} has no {POSTERIOR_FILE}", RESTORE)
