"""The tuner: a peft ``LoraModel`` whose adapters have posteriors.

peft injects ordinary LoRA layers; :class:`MonteCLoRATuner` then gives those of a MonteCLoRA adapter a posterior and
puts a :class:`DrawnLayer` in their forward pass. It keeps one posterior for each adapter and the hooks that make one
draw for each forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from operator import attrgetter
from typing import Any, cast

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftType
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from monteclora.adapters.config import MonteCLoRAConfig
from monteclora.adapters.layers import DrawnLayer, DrawnLinear
from monteclora.adapters.merging import shared_targets
from monteclora.adapters.offloading import check_here
from monteclora.adapters.quantised import keep_differentiable
from monteclora.adapters.scope import DrawScope
from monteclora.adapters.snapshot import unchanged_on_error
from monteclora.adapters.targets import check_target_names, initial_scales, layers_of, shapes_of
from monteclora.errors import ConfigError
from monteclora.posterior import AdapterPosterior, LayerShape
from monteclora.posterior.torch_private import parameters_of, parts_of

__all__ = ["TUNER_TYPE", "MonteCLoRATuner"]

# a PeftModel chooses its tuner by the type of its first configuration; the tuner then makes it LoRA
TUNER_TYPE = "MONTECLORA_TUNER"

_device_of = attrgetter("device")


class MonteCLoRATuner(LoraModel):
    """A ``peft.LoraModel`` whose MonteCLoRA adapters have posteriors.

    ``posteriors``, by adapter name, is a module of the ``PeftModel`` around this one, to which this one only refers:
    peft counts whatever is registered here, or in the layers, as adapter weights, and would write it into their file.
    ``mean_modules`` has the ``lora_A`` of their layers, ``hooked_layers`` the layers by name. While the adapters are
    disabled, and all their parameters frozen, ``trainable_later`` has the parameters of posteriors, and whether each is
    trainable once they are enabled; else it is None.
    """

    posteriors: nn.ModuleDict
    mean_modules: dict[str, list[nn.ModuleDict]]
    hooked_layers: dict[str, dict[str, LoraLayer]]
    trainable_later: dict[nn.Parameter, bool] | None
    scope: DrawScope
    begun: bool

    def __init__(self, model: nn.Module, peft_config: dict[str, PeftConfig], adapter_name: str, **kwargs: Any) -> None:
        for config in peft_config.values():
            config.peft_type = PeftType.LORA
        # peft's constructor injects the first adapter, with methods of this class that need these: a torch module takes
        # no attribute before its constructor has run
        self.__dict__.update(
            posteriors=nn.ModuleDict(),
            mean_modules={},
            hooked_layers={},
            trainable_later=None,
            scope=DrawScope(self),
            begun=False,
        )
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def begin(self, outermost: nn.Module, adapter_name: str) -> None:
        """Attach the posterior of the first adapter, when the ``PeftModel`` around this tuner is complete.

        Not earlier: with ``low_cpu_mem_usage`` whatever is made along with the layers has no memory.
        """
        self.scope.install([outermost], [])
        self.attach(adapter_name)
        self.begun = True

    def posterior(self, adapter_name: str) -> AdapterPosterior | None:
        """The posterior of an adapter, None where it is plain LoRA."""
        if adapter_name not in self.posteriors:
            return None
        return cast(AdapterPosterior, self.posteriors[adapter_name])

    def active_posteriors(self) -> list[AdapterPosterior]:
        """The posteriors of the active adapters."""
        found = [self.posterior(name) for name in self.active_adapters]
        return [posterior for posterior in found if posterior is not None]

    def drawn_posteriors(self) -> Sequence[AdapterPosterior]:
        """Those of :meth:`active_posteriors` whose layers are neither disabled nor merged nor switched off."""
        if torch.is_grad_enabled() and self.training:
            self.measure(begin=True)
        return [posterior for posterior in self.active_posteriors() if posterior.enabled and self.in_use(posterior)]

    def in_use(self, posterior: AdapterPosterior) -> bool:
        """Whether an active adapter's layers compute it: any of them is neither disabled nor merged."""
        layers = self.adapted_layers(posterior).values()
        return any(not layer.disable_adapters and not layer.merged for layer in layers)

    def is_trainable(self, posterior: AdapterPosterior) -> bool:
        """Whether rho, eta, A or B of a posterior's adapter is trainable."""
        if posterior.rho.requires_grad or posterior.eta.requires_grad:
            return True
        name = self._name_of(posterior)
        parts = ((layer.lora_A[name], layer.lora_B[name]) for layer in self.hooked_layers[name].values())
        return any(part.weight.requires_grad for pair in parts for part in pair)

    def check_here(self, posterior: AdapterPosterior) -> None:
        """Raise ConfigError for an adapter of which anything was offloaded since it was made."""
        name = self._name_of(posterior)
        check_here(posterior, zip(self.hooked_layers[name], self._mean_weights(name), strict=True), self.model)

    def means(self, posterior: AdapterPosterior) -> list[Tensor] | None:
        """mu of a posterior's layers, if it can be added to the noise of all of them at once.

        None if some are elsewhere until their layer runs, as those of sharded and offloaded models are.
        """
        name = self._name_of(posterior)
        device = posterior.rho.device
        means = cast(list[Tensor], self._mean_weights(name))
        plain = {*map(type, means)} <= {nn.Parameter, Tensor} and {*map(_device_of, means)} == {device}
        return means if plain and sum(map(Tensor.numel, means)) == posterior.cells else None

    def _mean_weights(self, adapter_name: str) -> list[Tensor | None]:
        return [parameters_of(parts_of(of)[adapter_name]).get("weight") for of in self.mean_modules[adapter_name]]

    def attach(self, adapter_name: str, posterior: AdapterPosterior | None = None) -> None:
        """Give an injected adapter its posterior: a new one at the prior, or one restored from a file.

        Raises:
            ConfigError: the adapter has a layer of a type that cannot be drawn, named with its type.
        """
        layers = layers_of(self.model, adapter_name)
        config = cast(MonteCLoRAConfig, self.peft_config[adapter_name])
        if not layers:
            raise ConfigError(
                f"adapter '{adapter_name}' has no LoRA layer to draw",
                "Name layers in target_modules; layers registered with peft by hand are not supported.",
            )
        if posterior is None:
            posterior = AdapterPosterior(
                shapes_of(layers, adapter_name),
                initial_scales(config, adapter_name, [layer for _, layer in layers]),
                config.resolved(),
                seed=config.noise_seed,
                device=_device_of(layers[0][1].get_base_layer().weight),
            )
        for index, (_, layer) in enumerate(layers):
            layer.lora_variant[adapter_name] = DrawnLayer(posterior, index, self.scope)
            if type(layer) is Linear:
                layer.__class__ = DrawnLinear
        posterior.trained = adapter_name in self.active_adapters and not config.inference_mode
        self.set_trainable(dict.fromkeys(posterior.parameters(), posterior.trained))
        self.posteriors[adapter_name] = posterior
        self.mean_modules[adapter_name] = [layer.lora_A for _, layer in layers]
        self.hooked_layers[adapter_name] = dict(layers)
        self.scope.install(self._modules_around([name for name, _ in layers]), self._checkpointable())

    def measure(self, *, begin: bool = False) -> None:
        """Fit new posteriors to the A that their adapters have now.

        Some initialisations (EVA, LoftQ's second pass) change A, and ranks, after the model is wrapped and before it is
        trained. The scales are those of the A that training begins with.

        Args:
            begin: training begins: A of the active adapters has its final initial value.
        """
        for name, posterior in list(self.posteriors.items()):
            config = self.peft_config[name]
            if posterior.measured or not isinstance(config, MonteCLoRAConfig):  # plain while peft saves the adapter
                continue
            layers = layers_of(self.model, name)
            if shapes_of(layers, name) != posterior.layers:
                trainable = self.trainable([cast(AdapterPosterior, posterior)]).values()
                self.attach(name)
                self.set_trainable(dict(zip(self.posteriors[name].parameters(), trainable, strict=True)))
            elif all(_is_here(layer.lora_A[name].weight) for _, layer in layers):
                scales = initial_scales(config, name, [layer for _, layer in layers])
                scale = cast(Tensor, posterior.scale)
                fitted = torch.tensor(scales, dtype=scale.dtype, device=scale.device)
                if not torch.equal(fitted, scale):  # transforms of torch.func list parameters, and allow no change
                    scale.copy_(fitted)
            cast(AdapterPosterior, self.posteriors[name]).measured = begin and name in self.active_adapters

    def layer_shapes(self, adapter_name: str) -> list[LayerShape]:
        """The layers that an adapter has.

        Raises:
            ConfigError: one of them is of a type that cannot be drawn, named with its type.
        """
        return shapes_of(layers_of(self.model, adapter_name), adapter_name)

    def _modules_around(self, names: list[str], *, inside_blocks: bool = False) -> list[nn.Module]:
        """The modules that contain a named layer, outermost first, down to the elements of lists of modules.

        A hook costs little, but a model has far more modules than blocks. ``inside_blocks`` goes down to the layers.
        """
        found: dict[str, nn.Module] = {}
        for name in names:
            module, parts = self.model, name.split(".")[:-1]
            found[""] = module
            for depth, part in enumerate(parts, 1):
                outer, module = module, module.get_submodule(part)
                found[".".join(parts[:depth])] = module
                if isinstance(outer, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and not inside_blocks:
                    break
        around = [found[name] for name in sorted(found, key=lambda name: (name.count(".") + bool(name), name))]
        return [self, *(m for m in around if not isinstance(m, (nn.ModuleList, nn.ModuleDict)))]

    def hook_everything(self) -> None:
        """Install the scope on every module that contains an adapted layer, also inside the blocks."""
        names = [name for layers in self.hooked_layers.values() for name in layers]
        self.scope.install(self._modules_around(names, inside_blocks=True), self._checkpointable())

    def adapted_layers(self, posterior: AdapterPosterior) -> dict[str, LoraLayer]:
        """A posterior's layers by name."""
        return self.hooked_layers[self._name_of(posterior)]

    def _name_of(self, posterior: AdapterPosterior) -> str:
        """The name of a posterior's adapter."""
        return next(name for name, known in self.posteriors.items() if known is posterior)

    def known_posteriors(self) -> list[AdapterPosterior]:
        """Those of all adapters, active or not."""
        return cast(list[AdapterPosterior], list(self.posteriors.values()))

    def _checkpointable(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if hasattr(module, "gradient_checkpointing")]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter's layers into the model; then a MonteCLoRA adapter gets its posterior.

        That of the first adapter is attached by :meth:`begin`.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, MonteCLoRAConfig) or not self.begun:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        check_target_names(config, model)
        with unchanged_on_error(model, adapter_name):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self.attach(adapter_name)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Add a combination of adapters, as a plain LoRA: the posterior of a combination is not known.

        Takes what :meth:`peft.LoraModel.add_weighted_adapter` takes.
        """
        given = {name: config for name, config in self.peft_config.items() if isinstance(config, MonteCLoRAConfig)}
        self.peft_config.update({name: config.plain_lora() for name, config in given.items()})
        try:
            super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            self.peft_config.update(given)

    def train(self, mode: bool = True) -> MonteCLoRATuner:
        """As in torch; quantised layers stay differentiable from the first time on."""
        super().train(mode)
        if mode:
            keep_differentiable(self.model)
        return self

    @property
    def generate(self) -> Callable[..., Any]:
        """That of the base model; in training mode the whole generation, which keeps a cache, has one draw."""
        generate: Callable[..., Any] = self.model.generate

        @wraps(generate)
        def under_one_draw(*args: Any, **kwargs: Any) -> Any:
            if not self.training or self.scope.held is not None:
                return generate(*args, **kwargs)
            with self.scope.holding(self.active_posteriors()):
                return generate(*args, **kwargs)

        return under_one_draw

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in peft; the posteriors become trainable and frozen with their adapters."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, posterior in self.posteriors.items():
            active = name in self.active_adapters and not inference_mode
            self.set_trainable(dict.fromkeys(posterior.parameters(), active))

    @property
    def disabled(self) -> bool:
        """Whether the adapters are disabled."""
        return self.trainable_later is not None

    def trainable(self, posteriors: Sequence[AdapterPosterior]) -> dict[nn.Parameter, bool]:
        """The parameters of posteriors, and whether each is trainable while the adapters are enabled."""
        later = self.trainable_later or {}
        return {p: later.get(p, p.requires_grad) for posterior in posteriors for p in posterior.parameters()}

    def set_trainable(self, parameters: Mapping[nn.Parameter, bool]) -> None:
        """Make parameters of posteriors trainable, or not; while the adapters are disabled, once they are enabled."""
        for parameter, trainable in parameters.items():
            if self.trainable_later is not None:
                self.trainable_later[parameter] = trainable
            parameter.requires_grad_(trainable and self.trainable_later is None)

    def disable_adapter_layers(self) -> None:
        """As in peft, which freezes the adapters until they are enabled; the posteriors are frozen with them."""
        super().disable_adapter_layers()
        self.trainable_later = self.trainable(self.known_posteriors())
        for parameter in self.trainable_later:
            parameter.requires_grad_(False)

    def enable_adapter_layers(self) -> None:
        """As in peft; the posteriors are trainable again if they were before, or were made so in the meantime."""
        super().enable_adapter_layers()
        later, self.trainable_later = self.trainable_later or {}, None
        self.set_trainable(later)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As in peft, posteriors included."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            posterior = self.posterior(name)
            if posterior is not None:
                self.set_trainable(dict.fromkeys(posterior.parameters(), requires_grad))

    def delete_adapter(self, adapter_name: str) -> None:
        """As in peft, posterior included; that of the adapter which takes over becomes trainable with it."""
        replaced = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        deleted = self.posterior(adapter_name)
        if deleted is not None:
            del self.posteriors[adapter_name], self.mean_modules[adapter_name], self.hooked_layers[adapter_name]
            for parameter in deleted.parameters():
                (self.trainable_later or {}).pop(parameter, None)
        if replaced:
            self.set_trainable({p: True for posterior in self.active_posteriors() for p in posterior.parameters()})

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in peft.

        Raises:
            ConfigError: a target's weight is also another layer's, which would change along with it; or draws are
                asked for, none of which would be merged.
        """
        self._check_merge()
        super().merge_adapter(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in peft; the base model is left without hooks.

        Raises:
            ConfigError: a target's weight is also another layer's, which would change along with it; or draws are
                asked for, none of which would be merged.
        """
        self._check_merge()
        merged = cast(nn.Module, super().merge_and_unload(*args, **kwargs))
        self.scope.remove()
        return merged

    def unload(self) -> nn.Module:
        """As in peft; the base model is left without hooks."""
        base = cast(nn.Module, super().unload())
        self.scope.remove()
        return base

    def _check_merge(self) -> None:
        if self.scope.samples:
            raise ConfigError(
                "merging inside posterior_sampling would merge the mean, and every draw would be the mean",
                "Merge outside the block, or write draws with monteclora.export_samples.",
            )
        shared = shared_targets(self.model)
        if shared:
            raise ConfigError(
                f"target module '{shared[0]}' shares its weight with another layer, which merging would change too",
                "Use monteclora.export_merged, which separates the two in what it writes.",
            )


def _is_here(weight: Tensor) -> bool:
    """Whether there are values to measure, rather than somewhere else until the layer runs."""
    return not weight.is_meta and weight.numel() > 0


PEFT_TYPE_TO_TUNER_MAPPING[cast(PeftType, TUNER_TYPE)] = MonteCLoRATuner
