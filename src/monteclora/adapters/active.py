"""The active posteriors of a wrapped model: their loss, their draws, and their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from monteclora.adapters.last_blocks import LastBlocks, last_blocks
from monteclora.adapters.posterior_sampler import PosteriorSampler
from monteclora.adapters.tuner import MonteCLoRATuner
from monteclora.errors import ConfigError
from monteclora.posterior import AdapterPosterior, Regulariser

__all__ = [
    "Regularisation",
    "active_posteriors",
    "drawn_blocks",
    "one_draw",
    "posterior_sampling",
    "regularisation",
    "sampled_posteriors",
    "train_posterior_only",
    "variational_loss",
]


def _tuner(model: nn.Module) -> MonteCLoRATuner:
    for module in model.modules():
        if isinstance(module, MonteCLoRATuner):
            return module
    hint = "Wrap it with monteclora.get_peft_model first."
    if any(isinstance(module, PeftModel) for module in model.modules()):
        hint = "Load a saved adapter with monteclora.from_pretrained, which loads the posterior too."
    raise ConfigError(f"{type(model).__name__} has no MonteCLoRA adapter", hint)


def active_posteriors(model: nn.Module) -> list[AdapterPosterior]:
    """The posteriors of the model's active adapters; ``model`` may be wrapped (DDP, compiled).

    Raises:
        ConfigError: the model has no MonteCLoRA adapter.
    """
    return _tuner(model).active_posteriors()


class Regularisation(NamedTuple):
    """What training learns of the regularisers of all active adapters.

    Attributes:
        loss: their weighted sum, a differentiable scalar.
        first: that of the first adapter, without gradient, to be logged.
    """

    loss: Tensor
    first: Regulariser


def regularisation(model: nn.Module) -> Regularisation | None:
    """The regularisers of the active adapters; None while their posteriors are switched off or the adapters disabled.

    Raises:
        ConfigError: the model has no MonteCLoRA adapter.
    """
    tuner = _tuner(model)
    if tuner.disabled:
        return None
    parts = [posterior.regulariser() for posterior in tuner.active_posteriors() if posterior.enabled]
    return Regularisation(torch.stack([part.loss for part in parts]).sum(), parts[0].detach()) if parts else None


def variational_loss(model: nn.Module) -> Tensor:
    """What to add to the task's loss, once for each optimiser step: the weighted KL terms and cooperative loss.

    Args:
        model: the wrapped model.

    Returns:
        A scalar, differentiable in rho and eta of the active adapters (docs/method.md section 4); zero while their
        posteriors are switched off or the adapters disabled.

    Raises:
        ConfigError: the model has no MonteCLoRA adapter.
    """
    found = regularisation(model)
    if found is not None:
        return found.loss
    posteriors = active_posteriors(model)
    return torch.zeros((), device=posteriors[0].rho.device if posteriors else None)


@contextmanager
def one_draw(model: nn.Module, index: int | None = None) -> Iterator[int]:
    """Inside the block every training forward pass of ``model`` makes the same draw, whichever adapter is active.

    A policy and a frozen copy of it then have the same noise, so that their log-probabilities differ by what was
    learned and by nothing else.

    Args:
        model: the wrapped model.
        index: number of the draw; None is the next one.

    Yields:
        The number of the draw.

    Raises:
        ConfigError: the model has no MonteCLoRA adapter.
    """
    tuner = _tuner(model)
    with tuner.scope.holding(tuner.active_posteriors(), index, shared=True) as held:
        yield held


@contextmanager
def posterior_sampling(
    model: nn.Module,
    seed: int = 0,
    *,
    num_samples: int = 1,
    resample: bool = True,
    first: int = 0,
    layers: int | None = None,
) -> Iterator[None]:
    """Inside the block, eval-mode forward passes draw from the posterior.

    The draws are numbered: forward pass i uses draw ``first + i`` of the stream ``seed``, whatever the batch, the
    device's global generators or training have done.

    Args:
        model: the wrapped model, in evaluation mode.
        seed: the stream.
        num_samples: S > 1 makes S draws per forward pass; call the model with the batch repeated S times along its
            first dimension (draw by draw).
        resample: False keeps the first draw for the whole block, as a generation with a cache needs.
        first: number of the first draw.
        layers: draw in so many of the last adapted blocks alone; with ``num_samples`` above 1 the blocks below then run
            for the first repetition of the batch alone, where a trial shows that this changes nothing. None draws in
            all.

    Raises:
        ConfigError: the model has no MonteCLoRA adapter, or none that is active, or fewer adapted blocks.
    """
    posteriors = sampled_posteriors(model)
    last = None if layers is None else drawn_blocks(model, layers)
    sampler = PosteriorSampler(seed, num_samples, resample=resample, first=first, last=last)
    with _tuner(model).scope.sampling(posteriors, sampler):
        yield


def keeping_prefix(model: nn.Module) -> AbstractContextManager[None]:
    """Forward passes inside the block are over the same rows, repeated for other draws of the same last blocks.

    The blocks below, which are not drawn, then run in the first of them alone.

    Raises:
        ConfigError: the model has no MonteCLoRA adapter.
    """
    return _tuner(model).scope.keeping_prefix()


def drawn_blocks(model: nn.Module, layers: int) -> LastBlocks:
    """The last ``layers`` adapted blocks of the active adapters, see :mod:`monteclora.adapters.last_blocks`.

    Raises:
        ConfigError: there are fewer, or no MonteCLoRA adapter.
    """
    tuner = _tuner(model)
    return last_blocks(tuner.model, {p: list(tuner.adapted_layers(p)) for p in sampled_posteriors(model)}, layers)


def sampled_posteriors(model: nn.Module) -> list[AdapterPosterior]:
    """The posteriors from which :func:`posterior_sampling` draws: :func:`active_posteriors`, at least one.

    Raises:
        ConfigError: the model has no MonteCLoRA adapter, none that is active, all are merged or disabled, or one
            is offloaded.
    """
    tuner = _tuner(model)
    posteriors = tuner.active_posteriors()
    if not posteriors:
        raise ConfigError(
            f"active adapters are {tuner.active_adapters}, which have no posterior",
            "Choose a MonteCLoRA adapter with model.set_adapter(name).",
        )
    if not any(tuner.in_use(posterior) for posterior in posteriors):
        raise ConfigError(
            f"active adapters are {tuner.active_adapters}, which are merged or disabled: every draw would be the mean",
            "Call model.unmerge_adapter(), or sample outside model.disable_adapter().",
        )
    for posterior in posteriors:
        tuner.check_here(posterior)
    return posteriors


def train_posterior_only(model: nn.Module) -> None:
    """Freeze everything but rho and eta of the active adapters: the second phase of post-hoc training (section 6)."""
    posteriors = active_posteriors(model)
    model.requires_grad_(False)
    for posterior in posteriors:
        posterior.enabled = True
        posterior.requires_grad_(True)
