"""Wrap a base model with MonteCLoRA adapters, new or saved ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from monteclora.adapters import checks, names, storage
from monteclora.adapters.config import OWN_TYPE, MonteCLoRAConfig
from monteclora.adapters.model import MonteCLoRAModel, other_configuration
from monteclora.adapters.snapshot import unchanged_on_error
from monteclora.adapters.targets import check_target_names
from monteclora.adapters.transformers_private import earlier_names
from monteclora.errors import ConfigError

__all__ = ["build", "from_pretrained", "get_peft_model"]


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


_WEIGHTS_PREFIX = "lora_"
_BY_TASK: dict[str | None, type[MonteCLoRAModel]] = {
    "SEQ_CLS": MonteCLoRAModelForSequenceClassification,
    "CAUSAL_LM": MonteCLoRAModelForCausalLM,
    "SEQ_2_SEQ_LM": MonteCLoRAModelForSeq2SeqLM,
    "TOKEN_CLS": MonteCLoRAModelForTokenClassification,
    "QUESTION_ANS": MonteCLoRAModelForQuestionAnswering,
    "FEATURE_EXTRACTION": MonteCLoRAModelForFeatureExtraction,
}


def build(model: nn.Module, config: MonteCLoRAConfig, adapter_name: str, **kwargs: Any) -> MonteCLoRAModel:
    """Wrap ``model`` in the class for the configuration's task; what peft refuses is a ConfigError."""
    of_task = _BY_TASK.get(config.task_type, MonteCLoRAModel)
    try:
        return of_task(model, config, adapter_name, **kwargs)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"peft refused the adapter: {error}", "Correct the configuration.") from error


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
        ConfigError: another kind of configuration, a name in ``target_modules`` that no module has, or a target of
            a type that cannot be drawn. The model is then left as it was.
    """
    if not isinstance(peft_config, MonteCLoRAConfig):
        raise other_configuration(peft_config)
    _refuse_wrapped(model)
    if kwargs.pop("mixed", False):
        raise ConfigError("mixed=True is not supported with MonteCLoRA", "Leave it out.")
    config = peft_config.of_type(OWN_TYPE)
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    if peft_config.base_model_name_or_path not in (None, config.base_model_name_or_path):
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{peft_config.base_model_name_or_path}' to "
            f"'{config.base_model_name_or_path}', the name of the model at hand.",
            stacklevel=2,
        )
    _warn_of_name(adapter_name)
    revision = kwargs.pop("revision", None)
    if revision is not None and config.revision not in (None, revision):
        warnings.warn(
            f"peft config has already set base model revision to {config.revision}, overwriting with revision "
            f"{revision}",
            stacklevel=2,
        )
    config.revision = revision or config.revision
    names.localised(config, model)
    check_target_names(config, model)
    with unchanged_on_error(model, adapter_name):
        return build(model, config, adapter_name, **kwargs)


def _warn_of_name(adapter_name: str) -> None:
    """peft tells an adapter's weights from others by their names, in which each begins with ``lora_``.

    The warning begins as peft's own does, here and where ``get_peft_model`` warns: filters written for peft apply.
    """
    if adapter_name in _WEIGHTS_PREFIX:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{_WEIGHTS_PREFIX}'. "
            "peft may not find its weights when it loads them: give it another name.",
            stacklevel=3,
        )


def _refuse_wrapped(model: nn.Module) -> None:
    if isinstance(model, MonteCLoRAModel):
        raise ConfigError(
            f"get_peft_model was given a {type(model).__name__}, which has adapters already",
            "Add another one with model.add_adapter, or give the model that model.unload() returns.",
        )
    if isinstance(model, PeftModel):
        raise ConfigError(
            f"get_peft_model was given a {type(model).__name__}, which has adapters of peft already",
            "Give the model that model.unload() returns.",
        )
    adapted = next((name for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)), None)
    if adapted is not None:
        # the layers of an earlier wrapper, whose draws would go on beside the new ones
        raise ConfigError(
            f"get_peft_model was given a {type(model).__name__} that was adapted before: '{adapted}' has an adapter",
            "Load the base model anew, or give the model that the first wrapper's unload() returns.",
        )


def from_pretrained(
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    key_mapping: dict[str, str] | None = None,
    **kwargs: Any,
) -> MonteCLoRAModel:
    """Load a saved adapter, mean and posterior; takes what ``PeftModel.from_pretrained`` takes.

    (``PeftModel.from_pretrained`` loads the mean of the same folder.)

    Args:
        model: the base model.
        model_id: a folder written by ``save_pretrained``, or such a repository on the hub.
        adapter_name: name of the adapter.
        is_trainable: whether to train it further.
        config: in place of the saved configuration; a :class:`MonteCLoRAConfig`, or a ``peft.LoraConfig`` for LoRA's
            part of it.
        key_mapping: patterns of names at the time of saving, and the model's names for them.
        **kwargs: passed on to peft, such as ``low_cpu_mem_usage``, ``subfolder`` or ``revision``.

    Raises:
        CheckpointError: no posterior beside the adapter, a damaged one, or one of another adapter. The model is then
            left as it was.
    """
    _warn_of_name(adapter_name)
    path = storage.find_posterior(model_id, **kwargs)
    if path is None:
        raise storage.missing_posterior(model_id)
    checks.check_adapter(model_id, kwargs.get("subfolder"))
    stored = storage.load_posterior(path)
    weights = storage.find_file(model_id, storage.WEIGHTS_FILE, **kwargs)
    stored.check_mean(weights)
    with checks.adapter_errors(model_id):
        config = config or PeftConfig.from_pretrained(str(model_id), **_of_the_hub(kwargs))
    if not isinstance(config, MonteCLoRAConfig):
        config = stored.config(config)
    config = config.of_type(OWN_TYPE)
    config.inference_mode = not is_trainable
    names.localised(config, model)
    if weights is not None:
        checks.check_head(weights, model)
    if key_mapping is None:
        key_mapping = earlier_names(model)
    options = {name: kwargs.pop(name) for name in ("autocast_adapter_dtype", "low_cpu_mem_usage") if name in kwargs}
    with unchanged_on_error(model, adapter_name), checks.adapter_errors(model_id):
        wrapped = build(model, config, adapter_name, **options)
        wrapped.load_adapter(model_id, adapter_name, is_trainable, key_mapping=key_mapping, **options, **kwargs)
        state = get_peft_model_state_dict(wrapped, adapter_name=adapter_name, save_embedding_layers=False)
        checks.check_finite(model_id, state)
    _name_labels(model, stored.labels)
    return wrapped


def _of_the_hub(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in ("subfolder", "revision", "cache_dir", "token") if name in arguments}


def _name_labels(model: nn.Module, labels: Mapping[int, str]) -> None:
    """Give a classifier whose labels have no names of their own those that the adapter was trained with."""
    config = getattr(model, "config", None)
    own = getattr(config, "id2label", None) or {}
    if config is not None and {*own} == {*labels} and all(own[index] == f"LABEL_{index}" for index in own):
        config.id2label = dict(labels)
        config.label2id = {name: index for index, name in labels.items()}
