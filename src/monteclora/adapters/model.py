"""A model with MonteCLoRA adapters: it saves and loads their posteriors."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from torch import nn

from monteclora.adapters import card, names, storage
from monteclora.adapters.config import MonteCLoRAConfig
from monteclora.adapters.hotswapping import refuse_posteriors
from monteclora.adapters.tuner import TUNER_TYPE, MonteCLoRATuner
from monteclora.errors import CheckpointError, ConfigError, MonteCLoRAError
from monteclora.posterior import AdapterPosterior
from monteclora.system import atomic

refuse_posteriors()

__all__ = ["MonteCLoRAModel", "other_configuration"]


class MonteCLoRAModel(PeftModel):
    """What a ``PeftModel`` with MonteCLoRA adapters does differently: it saves and loads their posteriors.

    Args:
        model: the base model; adapted in place.
        peft_config: a :class:`MonteCLoRAConfig`, of which the model keeps a copy.
        adapter_name: name of the adapter.
        **kwargs: passed on to peft.
    """

    base_model: MonteCLoRATuner
    _complete = _loading = False

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        if not isinstance(peft_config, MonteCLoRAConfig):
            raise other_configuration(peft_config)
        super().__init__(model, peft_config.of_type(TUNER_TYPE), adapter_name, **kwargs)
        self.peft_type = PeftType.LORA
        tuner = self.base_model
        self.posteriors = tuner.posteriors
        tuner.begin(self, adapter_name)
        self._complete = True

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, MonteCLoRA or plain LoRA; takes what ``PeftModel.add_adapter`` takes.

        What it adds to a model in evaluation mode is in that mode, so that it neither draws nor drops anything.
        """
        if isinstance(peft_config, MonteCLoRAConfig):
            peft_config = peft_config.of_type(PeftType.LORA)
        there = set(self.modules())
        with self._others_as_frozen():
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        if not self.training:
            for module in set(self.modules()) - there:
                module.training = False

    @contextmanager
    def _others_as_frozen(self) -> Iterator[None]:
        """Leave the posteriors that are there as frozen as they are, as peft leaves the weights of their adapters."""
        before = self.base_model.trainable(self.base_model.known_posteriors())
        try:
            yield
        finally:
            self.base_model.set_trainable(before)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in torch; a posterior follows its adapter to other ranks before an optimiser sees its parameters."""
        if self._complete:
            self.base_model.measure()
        yield from super().named_parameters(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in torch, for state that has the posterior of each mean in it.

        Raises:
            CheckpointError: another mean without its posterior, as ``peft.set_peft_model_state_dict`` brings it.
        """
        if not self._loading:
            self._check_means(state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _check_means(self, state_dict: Mapping[str, Any]) -> None:
        own = None
        for name in self.posteriors:
            if any(key.endswith(f"posteriors.{name}.rho") for key in state_dict):
                continue
            own = self.state_dict() if own is None else own
            means = {key: value for key, value in state_dict.items() if f".lora_A.{name}." in key and key in own}
            if not all(torch.equal(own[key], value.to(own[key])) for key, value in means.items()):
                raise CheckpointError(
                    f"the state of adapter '{name}' holds another mean and no posterior",
                    "Load a saved adapter with model.load_adapter(folder, name), or the whole of model.state_dict().",
                )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write each adapter as a plain LoRA, with ``posterior.safetensors`` beside it; files appear whole.

        Takes what ``PeftModel.save_pretrained`` takes. With ``path_initial_model_for_weight_conversion`` the adapter
        is written as a plain LoRA of twice the rank, without a posterior: it has none of that rank.

        Args:
            save_directory: the folder; every adapter but ``default`` has a folder of its name in it.
            safe_serialization: True; a pickle is refused.
            selected_adapters: names; all by default.
            save_embedding_layers: as in peft.
            is_main_process: False for a process that writes nothing.
            path_initial_model_for_weight_conversion: as in peft.
            tokenizer: saved along, if given.
            **kwargs: as in peft; the posteriors in a ``state_dict`` are saved in place of the model's.

        Raises:
            ConfigError: ``safe_serialization=False``.
            CheckpointError: the disk refuses a file.
        """
        if not safe_serialization:
            raise ConfigError(
                "safe_serialization=False asks for a pickle, which monteclora does not load", "Leave it out."
            )
        converted = path_initial_model_for_weight_conversion is not None
        selected = selected_adapters or list(self.peft_config)
        target = Path(save_directory)
        with atomic.staged(target, write=is_main_process) as folder:
            with self._plain_configurations():
                super().save_pretrained(
                    str(folder),
                    True,
                    selected_adapters,
                    save_embedding_layers,
                    is_main_process,
                    path_initial_model_for_weight_conversion,
                    **kwargs,
                )
            if is_main_process:
                for name in selected:
                    names.plain_file(_place(folder, name) / storage.WEIGHTS_FILE)
                    card.name_base_portably(_place(folder, name) / storage.CONFIG_FILE)
                    self._save_posterior(name, _place(folder, name), None if converted else kwargs.get("state_dict"))
                    if path_initial_model_for_weight_conversion is not None:
                        (_place(folder, name) / storage.POSTERIOR_FILE).unlink(missing_ok=True)
                        # peft writes a configuration there too
                        card.name_base_portably(Path(path_initial_model_for_weight_conversion) / storage.CONFIG_FILE)
            if is_main_process and tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
        if is_main_process:
            for name in selected:
                if converted or self.base_model.posterior(name) is None:
                    # one that an earlier adapter of this name left
                    (_place(target, name) / storage.POSTERIOR_FILE).unlink(missing_ok=True)

    def _save_posterior(self, name: str, folder: Path, state_dict: Mapping[str, Any] | None) -> None:
        posterior = self.base_model.posterior(name)
        if posterior is None:
            return
        mark = f"posteriors.{name}."
        state = {key.rpartition(mark)[2]: value for key, value in (state_dict or {}).items() if mark in key}
        storage.save_posterior(posterior, self.peft_config[name], folder, state=state, labels=self._labels())

    def _labels(self) -> dict[int, str]:
        """The names of a classifier's labels, if it has any of its own."""
        names: dict[int, str] = getattr(getattr(self.get_base_model(), "config", None), "id2label", None) or {}
        generic = all(str(name) == f"LABEL_{index}" for index, name in names.items())
        return {} if generic else {int(index): str(name) for index, name in names.items()}

    @contextmanager
    def _plain_configurations(self) -> Iterator[None]:
        """Have peft see plain LoRA configurations with portable patterns, which are what it is to write.

        The base model keeps the name it has here: with its configuration peft finds out whether its vocabulary was
        resized, and the embeddings have to be saved too.
        """
        configs = self.base_model.peft_config
        given = dict(configs)
        for name, config in given.items():
            plain = config.plain_lora() if isinstance(config, MonteCLoRAConfig) else copy.copy(config)
            plain.base_model_name_or_path = plain.base_model_name_or_path or self._base_name()
            names.plain_patterns(plain)
            configs[name] = plain
        try:
            yield
        finally:
            configs.update(given)

    def _base_name(self) -> str | None:
        return getattr(self.get_base_model(), "name_or_path", None) or None

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the card of the active adapter, or complete the metadata of one that is there."""
        name = self.active_adapters[0]
        posterior = self.base_model.posterior(name)
        settings = None if posterior is None else posterior.settings
        base = card.portable_name(self._base_name())
        tags = card.tags_of(self.get_base_model())
        card.write_card(Path(output_dir), self.peft_config[name], settings, base, self._labels(), tags)
        calibration = {} if posterior is None else posterior.calibration or {}
        if "report" in calibration:
            card.add_calibration(Path(output_dir), calibration["report"], calibration["about"])

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *args: Any,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in peft; an adapter with a posterior beside it gets that posterior, here or into the existing adapter.

        Raises:
            CheckpointError: a damaged posterior, or one that fits neither the adapter nor its mean; another mean for
                an adapter with a posterior, without one.
        """
        path = storage.find_posterior(model_id, **kwargs)
        stored = None if path is None else storage.load_posterior(path)
        existing = self.base_model.posterior(adapter_name)
        weights = storage.find_file(model_id, storage.WEIGHTS_FILE, **kwargs)
        if stored is not None:
            stored.check_mean(weights)
            if existing is not None:
                stored.check_fits(existing, self._layer_names(adapter_name, stored, key_mapping))
        elif existing is not None:
            raise CheckpointError(
                f"{model_id} has no {storage.POSTERIOR_FILE}, and adapter '{adapter_name}' has a posterior",
                "Load it under another name.",
            )
        known = adapter_name in self.peft_config
        local = self._local_mapping(weights, key_mapping)
        self._loading = stored is not None
        try:
            with self._others_as_frozen():
                result = super().load_adapter(model_id, adapter_name, is_trainable, *args, key_mapping=local, **kwargs)
        finally:
            self._loading = False
        self._name_base(adapter_name)
        if stored is None:
            return result
        try:
            if result.missing_keys:
                raise CheckpointError(f"{weights} has no {result.missing_keys[0]}", storage.RESTORE)
            existing = self.base_model.posterior(adapter_name)
            if existing is None:
                existing = self._restore(adapter_name, stored, key_mapping)
                self.base_model.set_trainable(dict.fromkeys(existing.parameters(), is_trainable))
        except MonteCLoRAError:
            if not known:
                self.delete_adapter(adapter_name)
            raise
        stored.copy_into(existing)
        return result

    def load_mean(self, model_id: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False) -> Any:
        """Load the weights of a plain LoRA into an adapter whose posterior is to be around these, as new as it is.

        Takes and returns what ``PeftModel.load_adapter`` does.
        """
        self._loading = True
        try:
            with self._others_as_frozen():
                local = self._local_mapping(storage.find_file(model_id, storage.WEIGHTS_FILE), None)
                result = super().load_adapter(str(model_id), adapter_name, is_trainable, key_mapping=local)
        finally:
            self._loading = False
        self._name_base(adapter_name)
        self.base_model.measure()
        return result

    def _name_base(self, adapter_name: str) -> None:
        """Give a loaded adapter the name that its base model has here; its file has the portable one."""
        config, here = self.peft_config[adapter_name], self._base_name()
        if card.portable_name(config.base_model_name_or_path) == card.portable_name(here):
            config.base_model_name_or_path = here

    def _local_mapping(self, weights: Path | None, key_mapping: dict[str, str] | None) -> dict[str, str] | None:
        """The ``key_mapping`` with which peft finds the tensors of a file in this model."""
        if weights is None:
            return key_mapping
        return names.key_mapping_for(self.get_base_model(), names.names_in(weights), key_mapping)

    def _layer_names(
        self, adapter_name: str, stored: storage.StoredPosterior, key_mapping: dict[str, str] | None
    ) -> list[str]:
        """What this model calls the layers of a stored posterior."""
        stored_names = [layer.name for layer in stored.layers]
        return names.current_names(self, self.peft_config[adapter_name], stored_names, key_mapping, stored.path)

    def _restore(
        self, adapter_name: str, stored: storage.StoredPosterior, key_mapping: dict[str, str] | None
    ) -> AdapterPosterior:
        """Give an adapter that was loaded as a plain LoRA its configuration and posterior."""
        stored.check_layers(
            self.base_model.layer_shapes(adapter_name), self._layer_names(adapter_name, stored, key_mapping)
        )
        plain = self.peft_config[adapter_name]
        self.peft_config[adapter_name] = stored.config(plain).of_type(PeftType.LORA)
        try:
            self.base_model.attach(adapter_name)
        except MonteCLoRAError:
            self.peft_config[adapter_name] = plain
            raise
        posterior = self.base_model.posterior(adapter_name)
        assert posterior is not None
        return posterior


def _place(folder: Path, adapter_name: str) -> Path:
    """Where peft writes an adapter."""
    return folder if adapter_name == "default" else folder / adapter_name


def other_configuration(config: object) -> ConfigError:
    """What is said of a configuration of another method."""
    return ConfigError(
        f"get_peft_model was given a {type(config).__name__}, expected a MonteCLoRAConfig",
        "Use peft.get_peft_model for other methods.",
    )
