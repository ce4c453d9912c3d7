"""The configuration: a ``peft.LoraConfig`` with the method's own fields."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args

from peft import LoraConfig

from monteclora.errors import ConfigError
from monteclora.posterior import PosteriorSettings
from monteclora.posterior.dirichlet import Approximation
from monteclora.posterior.settings import Estimator
from monteclora.posterior.wishart import Covariance

Fidelity = Literal["default", "paper"]
Noise = Literal["shared", "per_example"]

__all__ = ["DEFAULT_SAMPLE_SCALE", "Fidelity", "MonteCLoRAConfig", "Noise"]

DEFAULT_SAMPLE_SCALE = "relative:0.3"
_PAPER_SAMPLE_SCALE = 5e-3
# LoRA variants with a forward of their own; a drawn A means nothing to them
_OTHER_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "target_parameters",
)


@dataclass
class MonteCLoRAConfig(LoraConfig):
    """Configure a MonteCLoRA adapter; every field of ``peft.LoraConfig`` works as it does there.

    Attributes:
        num_components: N, the number of mixture components; it costs neither time nor memory.
        sample_scale: eps. A number is absolute; ``"relative:c"`` is c times the root mean square of each layer's
            initial A, which transfers between ranks and widths. None is ``"relative:0.3"``, or the authors' recommended
            5e-3 with ``fidelity="paper"``.
        kl_weight: weight of the KL terms.
        coop_weight: weight of the cooperative loss ``||pi||^2``; 0 turns it off.
        covariance: ``"diagonal"`` (the published code) or ``"full"`` (the paper's text) Sigma.
        dirichlet: ``"exact"`` or ``"laplace"`` law of the mixture weights.
        regulariser: ``"expected"`` takes KL_z and ``||pi||^2`` in closed form, ``"sampled"`` those of the draw. None
            is ``"expected"``, or ``"sampled"`` with ``fidelity="paper"``.
        noise: ``"shared"`` by the batch or ``"per_example"`` (flipout).
        alpha_prior: concentration of the Dirichlet prior.
        degrees_of_freedom: nu of the Wishart law; None is each layer's rank.
        normalised: whether ``E[Sigma] = V`` at every rank. None is True, or False with ``fidelity="paper"``.
        fidelity: ``"paper"`` switches the three defaults above to the published ones and nothing else.
        noise_seed: the noise stream, apart from the global generators.

    Raises:
        ConfigError: a field out of its range, or combined with a LoRA variant that replaces the forward pass.
    """

    num_components: int = 4
    sample_scale: float | str | None = None
    kl_weight: float = 1e-5
    coop_weight: float = 1.0
    covariance: Covariance = "diagonal"
    dirichlet: Approximation = "exact"
    regulariser: Estimator | None = None
    noise: Noise = "shared"
    alpha_prior: float = 1.0
    degrees_of_freedom: float | None = None
    normalised: bool | None = None
    fidelity: Fidelity = "default"
    noise_seed: int = 0
    # peft refuses layers whose configuration asks for a variant it does not know. Set unless this package does the
    # wrapping, it keeps peft.get_peft_model (and trainers that call it) from making a plain LoRA of this in silence.
    wrap_with_monteclora_get_peft_model: bool = field(
        default=True, init=False, repr=False, metadata={"is_lora_variant": True}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("fidelity", self.fidelity, Fidelity)
        paper = self.fidelity == "paper"
        if self.sample_scale is None:
            self.sample_scale = _PAPER_SAMPLE_SCALE if paper else DEFAULT_SAMPLE_SCALE
        if self.regulariser is None:
            self.regulariser = "sampled" if paper else "expected"
        if self.normalised is None:
            self.normalised = not paper
        self._check()

    def _check(self) -> None:
        _one_of("covariance", self.covariance, Covariance)
        _one_of("dirichlet", self.dirichlet, Approximation)
        _one_of("regulariser", self.regulariser, Estimator)
        _one_of("noise", self.noise, Noise)
        if isinstance(self.num_components, bool) or not isinstance(self.num_components, int) or self.num_components < 1:
            raise _wrong("num_components", self.num_components, "a whole number of at least 1")
        if isinstance(self.noise_seed, bool) or not isinstance(self.noise_seed, int):
            raise _wrong("noise_seed", self.noise_seed, "a whole number")
        for name in ("kl_weight", "coop_weight"):
            _number(name, getattr(self, name), zero=True)
        _number("alpha_prior", self.alpha_prior, zero=False)
        if self.degrees_of_freedom is not None:
            _number("degrees_of_freedom", self.degrees_of_freedom, zero=False)
        self.parse_sample_scale()
        for name in _OTHER_VARIANTS:
            if getattr(self, name, None):
                raise ConfigError(f"{name} cannot be combined with MonteCLoRA", "Leave it out, or use peft.LoraConfig.")
        if self.init_lora_weights == "mica":
            raise ConfigError("init_lora_weights='mica' replaces LoRA's forward pass", "Choose another initialisation.")

    def parse_sample_scale(self) -> tuple[bool, float]:
        """Whether ``sample_scale`` is relative, and its number.

        Raises:
            ConfigError: neither a non-negative number nor ``relative:`` and one.
        """
        text, relative = self.sample_scale, False
        if isinstance(text, str) and text.startswith("relative:"):
            text, relative = text.removeprefix("relative:"), True
        try:
            value = float(cast(str, text))
        except (TypeError, ValueError):
            value = math.nan
        if isinstance(text, bool) or not (0.0 <= value < math.inf):
            raise ConfigError(
                f"sample_scale is {self.sample_scale!r}, expected a number of at least 0, or 'relative:' and one",
                "For example relative:0.3, which is 0.3 times the size of each layer's initial A.",
            )
        return relative, value

    @property
    def _custom_modules(self) -> dict[type, type] | None:
        """What peft reads before it makes a layer of any type.

        Its bitsandbytes layers do not look for unknown variants, so the refusal that the guard above brings about would
        not reach a model that has only those.
        """
        if self.wrap_with_monteclora_get_peft_model:
            raise ConfigError(
                "peft was given a MonteCLoRAConfig, of which it can only make a plain LoRA",
                "Wrap the model with monteclora.get_peft_model, and give trainers the wrapped model.",
            )
        return self._modules

    @_custom_modules.setter
    def _custom_modules(self, modules: dict[type, type] | None) -> None:
        self._modules = modules

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Let peft inject LoRA layers for this configuration: the caller adds the posterior."""
        self.wrap_with_monteclora_get_peft_model = False
        try:
            yield
        finally:
            self.wrap_with_monteclora_get_peft_model = True

    def posterior_settings(self) -> PosteriorSettings:
        """The posterior's share of this configuration."""
        return PosteriorSettings(
            num_components=self.num_components,
            covariance=self.covariance,
            dirichlet=self.dirichlet,
            normalised=bool(self.normalised),
            estimator=cast(Estimator, self.regulariser),
            per_example=self.noise == "per_example",
            alpha_prior=self.alpha_prior,
            degrees_of_freedom=self.degrees_of_freedom,
            kl_weight=self.kl_weight,
            coop_weight=self.coop_weight,
        )

    def method_fields(self) -> dict[str, Any]:
        """The method's own fields, as they are stored beside the adapter."""
        return {name: getattr(self, name) for name in _METHOD_FIELDS if name != _GUARD}

    def to_dict(self) -> dict[str, Any]:
        """The LoRA fields: what ``adapter_config.json`` holds, so that any LoRA reader takes the adapter."""
        plain: dict[str, Any] = super().to_dict()
        return {key: value for key, value in plain.items() if key not in _METHOD_FIELDS}


_GUARD = "wrap_with_monteclora_get_peft_model"
_METHOD_FIELDS = tuple(f.name for f in fields(MonteCLoRAConfig) if f.name not in {g.name for g in fields(LoraConfig)})


def _wrong(name: str, value: object, expected: str) -> ConfigError:
    default = MonteCLoRAConfig.__dataclass_fields__[name].default
    shown = "" if default is None else f", {default}"
    return ConfigError(f"{name} is {value!r}, expected {expected}", f"Leave it out for the default{shown}.")


def _one_of(name: str, value: object, choices: Any) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise _wrong(name, value, " or ".join(allowed))


def _number(name: str, value: object, *, zero: bool) -> None:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not numeric or cast(float, value) < 0 or (value == 0 and not zero):
        raise _wrong(name, value, f"a finite number {'of at least' if zero else 'above'} 0")
