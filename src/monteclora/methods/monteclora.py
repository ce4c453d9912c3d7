"""MonteCLoRA (Seth et al. 2025): LoRA whose A is drawn from a learned posterior in training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_type_hints

from monteclora.errors import CheckpointError
from monteclora.methods.adapters import RESTORE, AdapterMethod
from monteclora.methods.base import Added, Plan, TaskKind
from monteclora.methods.lora import LoRAFields, check_names, lora_arguments, seed_everything
from monteclora.posterior.settings import PosteriorSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["MonteCLoRA", "MonteCLoRAOptions"]


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
    described_by: ClassVar[tuple[type, ...]] = (PosteriorSettings,)

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


class MonteCLoRA(AdapterMethod):
    """See :class:`~monteclora.methods.base.Method`."""

    name = "monteclora"
    description = "Bayesian LoRA: A is drawn from a learned mixture of Gaussians while training"
    options = MonteCLoRAOptions
    has_posterior = True
    takes_laplace = False

    def wrap(self, model: PreTrainedModel, options: MonteCLoRAOptions, task_kind: TaskKind, seed: int) -> nn.Module:
        """Put a MonteCLoRA adapter on the model; the noise stream has the same seed.

        Raises:
            ConfigError: an option names a layer that does not exist or that cannot be drawn.
        """
        from monteclora.adapters.config import MonteCLoRAConfig
        from monteclora.adapters.wrapping import get_peft_model

        check_names(options, model)
        arguments = lora_arguments(options, model, task_kind) | options.settings().given()
        config = MonteCLoRAConfig(**arguments, noise_seed=seed)
        seed_everything(seed)
        return get_peft_model(model, config)

    def start_from(self, model: PreTrainedModel, adapter: Path, options: MonteCLoRAOptions, seed: int) -> nn.Module:
        """As in the base class; a relative scale is one to the A that is loaded."""
        from monteclora.adapters.grafting import from_plain

        return from_plain(model, adapter, options.settings(), noise_seed=seed, is_trainable=True)

    def begin_phase(self, model: nn.Module, plan: Plan) -> None:
        """The phases of docs/method.md section 6."""
        from monteclora.adapters.active import active_posteriors, train_posterior_only

        if plan.phase == "posterior":
            train_posterior_only(model)
            return
        for posterior in active_posteriors(model):
            posterior.enabled = plan.phase == "cooperative"
            posterior.requires_grad_(posterior.enabled)

    def decays(self, name: str) -> bool:
        """As in the base class; rho and eta are regularised by their prior instead."""
        return super().decays(name) and ".posteriors." not in f".{name}"

    def added_loss(self, model: nn.Module) -> Added | None:
        """The regulariser, docs/method.md section 4."""
        from monteclora.adapters.active import regularisation

        found = regularisation(model)
        return None if found is None else Added(found.loss, {"kl": found.first.kl, "pi_squared_norm": found.first.coop})

    def diverged(self, model: nn.Module) -> str | None:
        """A posterior at its bound: post-hoc training moves nothing else, so that the mean's metrics tell nothing.

        Without a KL term nothing holds a posterior that collapses to its mean, and it is no divergence.
        """
        from monteclora.adapters.active import active_posteriors
        from monteclora.posterior.bounds import BOUND, rows_destroyed

        for posterior in active_posteriors(model):
            rho, held = posterior.rho, posterior.settings.kl_weight > 0
            rows = rows_destroyed(rho, collapse=held) if posterior.enabled else 0
            if rows:
                return (
                    f"the posterior diverged: rho is at its bound of {BOUND:g} in {rows} of {len(rho)} rows, where "
                    f"draws are {math.exp(BOUND):.0e} times as wide as the prior's, or as narrow,"
                )
        return None

    def kept_whole(self, model: nn.Module) -> list[nn.Module]:
        """Rho and eta: the draws of all layers are made of them before the first block runs."""
        from monteclora.adapters.active import active_posteriors

        return list(active_posteriors(model))

    def load(self, model: nn.Module, folder: Path) -> None:
        """As for every adapter; the posterior must be beside it."""
        from monteclora.adapters.storage import POSTERIOR_FILE

        super().load(model, folder)
        if not (folder / POSTERIOR_FILE).is_file():
            raise CheckpointError(f"{folder} has no {POSTERIOR_FILE}", RESTORE)
