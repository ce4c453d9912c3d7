"""Wrap a model, load one, and reach its posteriors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from monteclora.adapters import storage
from monteclora.adapters.config import MonteCLoRAConfig
from monteclora.adapters.scope import PosteriorSampler
from monteclora.adapters.snapshot import unchanged_on_error
from monteclora.adapters.tuner import MonteCLoRATuner, check_target_names
from monteclora.errors import ConfigError, MonteCLoRAError
from monteclora.posterior import AdapterPosterior
from monteclora.system.atomic import staged

__all__ = [
    "MonteCLoRAModel",
    "active_posteriors",
    "from_pretrained",
    "get_peft_model",
    "one_draw",
    "posterior_sampling",
    "sampled_posteriors",
    "train_posterior_only",
    "variational_loss",
]


class MonteCLoRAModel(PeftModel):
    """What a ``PeftModel`` with MonteCLoRA adapters does differently: it saves and loads their posteriors."""

    base_model: MonteCLoRATuner

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """As in peft, with ``posterior.safetensors`` beside each adapter; files appear whole or not at all.

        ``adapter_model.safetensors`` and ``adapter_config.json`` are a plain LoRA's.
        """
        with staged(Path(save_directory), write=is_main_process) as folder:
            super().save_pretrained(
                str(folder), safe_serialization, selected_adapters, save_embedding_layers, is_main_process, **kwargs
            )
            for name in (selected_adapters or list(self.peft_config)) if is_main_process else []:
                posterior = self.base_model.posterior(name)
                if posterior is not None:
                    target = folder if name == "default" else folder / name
                    storage.save_posterior(posterior, self.peft_config[name], target / storage.POSTERIOR_FILE)

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """As in peft; an adapter with a posterior beside it gets that posterior, here or into the existing adapter.

        Raises:
            CheckpointError: a damaged posterior, or one that does not fit the adapter.
        """
        path = storage.find_posterior(model_id, **kwargs)
        stored = None if path is None else storage.load_posterior(path)
        existing = self.base_model.posterior(adapter_name)
        if stored is not None and existing is not None:
            stored.check_fits(existing)
        known = adapter_name in self.peft_config
        result = super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)
        if stored is None:
            return result
        if existing is not None:
            stored.copy_into(existing)
            return result
        try:
            self._restore(adapter_name, stored)
        except MonteCLoRAError:
            if not known:
                self.delete_adapter(adapter_name)
            raise
        restored = self.base_model.posterior(adapter_name)
        assert restored is not None
        restored.requires_grad_(is_trainable)
        return result

    def _restore(self, adapter_name: str, stored: storage.StoredPosterior) -> None:
        """Give an adapter that was loaded as a plain LoRA its configuration and posterior."""
        config = stored.config(self.peft_config[adapter_name])
        layers = self.base_model.layer_shapes(adapter_name)
        posterior = stored.build(config, layers, self.base_model.device_of(adapter_name))
        self.peft_config[adapter_name] = config
        self.base_model.attach(adapter_name, posterior)


def _as_monteclora(model: PeftModel) -> MonteCLoRAModel:
    """Turn a ``PeftModel`` over LoRA into a :class:`MonteCLoRAModel`, in place."""
    model.__class__ = _CLASSES[type(model)]
    tuner = model.base_model
    tuner.__class__ = MonteCLoRATuner
    tuner.setup()
    model.posteriors = tuner.posteriors
    tuner.scope.install([model], [])
    return cast(MonteCLoRAModel, model)


class MonteCLoRAModelForSequenceClassification(MonteCLoRAModel, peft.PeftModelForSequenceClassification):
    """See :class:`MonteCLoRAModel`."""


class MonteCLoRAModelForCausalLM(MonteCLoRAModel, peft.PeftModelForCausalLM):
    """See :class:`MonteCLoRAModel`."""


class MonteCLoRAModelForSeq2SeqLM(MonteCLoRAModel, peft.PeftModelForSeq2SeqLM):
    """See :class:`MonteCLoRAModel`."""


class MonteCLoRAModelForTokenClassification(MonteCLoRAModel, peft.PeftModelForTokenClassification):
    """See :class:`MonteCLoRAModel`."""


class MonteCLoRAModelForQuestionAnswering(MonteCLoRAModel, peft.PeftModelForQuestionAnswering):
    """See :class:`MonteCLoRAModel`."""


class MonteCLoRAModelForFeatureExtraction(MonteCLoRAModel, peft.PeftModelForFeatureExtraction):
    """See :class:`MonteCLoRAModel`."""


_CLASSES: dict[type, type[MonteCLoRAModel]] = {
    PeftModel: MonteCLoRAModel,
    peft.PeftModelForSequenceClassification: MonteCLoRAModelForSequenceClassification,
    peft.PeftModelForCausalLM: MonteCLoRAModelForCausalLM,
    peft.PeftModelForSeq2SeqLM: MonteCLoRAModelForSeq2SeqLM,
    peft.PeftModelForTokenClassification: MonteCLoRAModelForTokenClassification,
    peft.PeftModelForQuestionAnswering: MonteCLoRAModelForQuestionAnswering,
    peft.PeftModelForFeatureExtraction: MonteCLoRAModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
) -> MonteCLoRAModel:
    """Wrap ``model`` with a MonteCLoRA adapter; takes what ``peft.get_peft_model`` takes.

    Initial weights and the state of the global generators are those that a plain LoRA of the same configuration gives.
    In training mode every forward pass draws from the posterior; in evaluation mode the mean is used.

    Args:
        model: the base model; changed in place, as peft does.
        peft_config: a :class:`MonteCLoRAConfig`.
        adapter_name: name of the adapter.
        **kwargs: passed on to peft.

    Raises:
        ConfigError: another kind of configuration, a name in ``target_modules`` that no module bears, or a target of
            a type that cannot be drawn. The model is then left as it was.
    """
    if not isinstance(peft_config, MonteCLoRAConfig):
        raise ConfigError(
            f"get_peft_model was given a {type(peft_config).__name__}, expected a MonteCLoRAConfig",
            "Use peft.get_peft_model for other methods.",
        )
    if isinstance(model, PeftModel):
        raise ConfigError(
            f"get_peft_model was given a {type(model).__name__}, which has adapters already",
            "Add another one with model.add_adapter, or give the model that model.unload() returns.",
        )
    if kwargs.get("mixed"):
        raise ConfigError("mixed=True is not supported with MonteCLoRA", "Leave it out.")
    check_target_names(peft_config, model)
    with unchanged_on_error(model, adapter_name), peft_config.handled():
        try:
            wrapped = peft.get_peft_model(model, peft_config, adapter_name, **kwargs)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"peft refused the adapter: {error}", "Correct the configuration.") from error
        monteclora_model = _as_monteclora(wrapped)
        monteclora_model.base_model.attach(adapter_name)
    return monteclora_model


def from_pretrained(
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    **kwargs: Any,
) -> MonteCLoRAModel:
    """Load a saved adapter, mean and posterior; takes what ``PeftModel.from_pretrained`` takes.

    (``PeftModel.from_pretrained`` loads the mean of the same folder.)

    Args:
        model: the base model.
        model_id: a folder written by ``save_pretrained``, or such a repository on the hub.
        adapter_name: name of the adapter.
        is_trainable: whether to go on training it.
        **kwargs: passed on to peft, such as ``low_cpu_mem_usage``, ``subfolder`` or ``revision``.

    Raises:
        CheckpointError: no posterior beside the adapter, a damaged one, or one of another adapter. The model is then
            left as it was.
    """
    path = storage.find_posterior(model_id, **kwargs)
    if path is None:
        raise storage.missing_posterior(model_id)
    storage.check_adapter(model_id, kwargs.get("subfolder"))
    stored = storage.load_posterior(path)
    with unchanged_on_error(model, adapter_name), storage.adapter_errors(model_id):
        wrapped = _as_monteclora(PeftModel.from_pretrained(model, model_id, adapter_name, is_trainable, **kwargs))
        storage.check_finite(model_id, get_peft_model_state_dict(wrapped, adapter_name=adapter_name))
        wrapped._restore(adapter_name, stored)
    return wrapped


def _tuner(model: nn.Module) -> MonteCLoRATuner:
    for module in model.modules():
        if isinstance(module, MonteCLoRATuner):
            return module
    raise ConfigError(
        f"{type(model).__name__} has no MonteCLoRA adapter", "Wrap it with monteclora.get_peft_model first."
    )


def active_posteriors(model: nn.Module) -> list[AdapterPosterior]:
    """The posteriors of the model's active adapters; ``model`` may be wrapped (DDP, compiled).

    Raises:
        ConfigError: the model has no MonteCLoRA adapter.
    """
    return _tuner(model).active_posteriors()


def variational_loss(model: nn.Module) -> Tensor:
    """What to add to the task's loss, once for each optimiser step: the weighted KL terms and cooperative loss.

    Args:
        model: the wrapped model.

    Returns:
        A scalar, differentiable in rho and eta of the active adapters (docs/method.md section 4); zero while their
        posteriors are switched off.

    Raises:
        ConfigError: the model has no MonteCLoRA adapter.
    """
    posteriors = active_posteriors(model)
    losses = [posterior.regulariser().loss for posterior in posteriors if posterior.enabled]
    if losses:
        return torch.stack(losses).sum()
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
    scope, posteriors = _tuner(model).scope, active_posteriors(model)
    held = max((posterior.draws for posterior in posteriors), default=0) if index is None else index
    before, scope.held = scope.held, held
    try:
        yield held
    finally:
        scope.held = before


@contextmanager
def posterior_sampling(
    model: nn.Module, seed: int = 0, *, num_samples: int = 1, resample: bool = True, first: int = 0
) -> Iterator[None]:
    """Inside the block, eval-mode forward passes draw from the posterior.

    The draws are numbered: forward pass i uses draw ``first + i`` of the stream ``seed``, whatever the batch, the
    device's global generators or training have done.

    Args:
        model: the wrapped model, in evaluation mode.
        seed: the stream.
        num_samples: S > 1 makes S draws a forward pass; call the model with the batch repeated S times along its
            first dimension (draw by draw).
        resample: False keeps the first draw for the whole block, as a generation with a cache needs.
        first: number of the first draw.

    Raises:
        ConfigError: the model has no MonteCLoRA adapter, or none that is active.
    """
    posteriors = sampled_posteriors(model)
    sampler = PosteriorSampler(seed, num_samples, resample=resample, first=first)
    with _tuner(model).scope.sampling(posteriors, sampler):
        yield


def sampled_posteriors(model: nn.Module) -> list[AdapterPosterior]:
    """The posteriors from which :func:`posterior_sampling` draws: :func:`active_posteriors`, at least one.

    Raises:
        ConfigError: the model has no MonteCLoRA adapter, none that is active, or all are merged or disabled.
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
    return posteriors


def train_posterior_only(model: nn.Module) -> None:
    """Freeze everything but rho and eta of the active adapters: the second phase of post-hoc training (section 6)."""
    posteriors: Sequence[AdapterPosterior] = active_posteriors(model)
    model.requires_grad_(False)
    for posterior in posteriors:
        posterior.enabled = True
        posterior.requires_grad_(True)
