"""The configuration: a ``peft.LoraConfig`` with the method's own fields."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, cast

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from monteclora.errors import ConfigError
from monteclora.posterior.settings import PosteriorSettings, is_whole

__all__ = ["OTHER_VARIANTS", "OWN_TYPE", "MonteCLoRAConfig"]


class _OwnType(str):
    """A name that peft can take for one of its enumeration."""

    @property
    def value(self) -> str:
        """What peft's messages show."""
        return str(self)


# the type of a configuration that no model has taken yet: peft has no tuner of this type, and makes no LoRA of it
OWN_TYPE = _OwnType("MONTECLORA")
# LoRA variants with a forward of their own; a drawn A means nothing to them
OTHER_VARIANTS = (
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
class MonteCLoRAConfig(PosteriorSettings, LoraConfig):
    """Configure a MonteCLoRA adapter; every field of ``peft.LoraConfig`` works as it does there.

    The method's own fields are those of :class:`~monteclora.posterior.settings.PosteriorSettings`, and:

    Attributes:
        noise_seed: the noise stream, apart from the global generators.

    Raises:
        ConfigError: a field out of its range, or combined with a LoRA variant that replaces the forward pass.
    """

    noise_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = cast(PeftType, OWN_TYPE)
        for name, message in [*self.option_problems(), *self._lora_problems()]:
            raise ConfigError(f"{name} {message}", _hint(name))
        for name in OTHER_VARIANTS:
            if getattr(self, name, None):
                raise ConfigError(f"{name} cannot be combined with MonteCLoRA", "Leave it out, or use peft.LoraConfig.")
        if self.init_lora_weights == "mica":
            raise ConfigError("init_lora_weights='mica' replaces LoRA's forward pass", "Choose another initialisation.")

    def _lora_problems(self) -> list[tuple[str, str]]:
        """What is wrong with LoRA's fields and not noticed by peft until a layer is made."""
        found = []
        if not is_whole(self.noise_seed):
            found.append(("noise_seed", f"is {self.noise_seed!r}, expected a whole number"))
        if not is_whole(self.r) or self.r < 1:
            found.append(("r", f"is {self.r!r}, expected a whole number of at least 1"))
        for name, rank in (self.rank_pattern or {}).items():
            if not is_whole(rank) or rank < 1:
                found.append(("rank_pattern", f"gives {name!r} the rank {rank!r}, expected a whole number above 0"))
        for name, alpha in {"lora_alpha": self.lora_alpha, **(self.alpha_pattern or {})}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
                field = "lora_alpha" if name == "lora_alpha" else "alpha_pattern"
                given = f"is {alpha!r}" if field == name else f"gives {name!r} the alpha {alpha!r}"
                found.append((field, f"{given}, expected a finite number"))
        if self.bias not in ("none", "all", "lora_only"):
            found.append(("bias", f"is {self.bias!r}, expected none, all or lora_only"))
        dropout = self.lora_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            found.append(("lora_dropout", f"is {dropout!r}, expected a number of at least 0 and below 1"))
        return found

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal; that a model has taken one of the two makes no difference."""
        return isinstance(other, MonteCLoRAConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def of_type(self, kind: str) -> MonteCLoRAConfig:
        """A copy that peft takes for one of ``kind``."""
        copied = copy.copy(self)
        copied.peft_type = cast(PeftType, kind)
        return copied

    def plain_lora(self) -> LoraConfig:
        """LoRA's fields alone: what ``adapter_config.json`` holds, so that any LoRA reader takes the adapter."""
        return LoraConfig(**{f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.init})

    def method_fields(self) -> dict[str, Any]:
        """The method's own fields, as they were given and as they are stored beside the adapter."""
        return {**self.given(), "noise_seed": self.noise_seed}

    def to_dict(self) -> dict[str, Any]:
        """Every field, for ``MonteCLoRAConfig(**config.to_dict())``, which equals this one."""
        return {**super().to_dict(), "peft_type": OWN_TYPE}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> MonteCLoRAConfig:
        """Read what ``save_pretrained`` of a configuration or of a model wrote.

        Args:
            pretrained_model_name_or_path: a folder, or a repository on the hub.
            subfolder: of it.
            **kwargs: passed on to peft, such as ``revision``.

        Raises:
            CheckpointError: no configuration of an adapter, an adapter without a posterior, or a damaged one.
        """
        from monteclora.adapters import checks, storage

        with checks.adapter_errors(pretrained_model_name_or_path):
            found = PeftConfig.from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        if isinstance(found, MonteCLoRAConfig):
            return found
        path = storage.find_posterior(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if path is None:
            raise storage.missing_posterior(Path(pretrained_model_name_or_path))
        return storage.load_posterior(path).config(found)


def _hint(name: str) -> str:
    default = MonteCLoRAConfig.__dataclass_fields__[name].default
    plain = isinstance(default, (int, float, str))
    return f"Leave it out for the default{f', {default}' if plain else ''}."


class _Refusal:
    """Takes the place of a tuner where peft is given a configuration that only this package can use."""

    uses_shared_state = False  # peft asks before it makes one

    def __new__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(
            "peft was given a MonteCLoRAConfig, of which it can only make a plain LoRA",
            "Wrap the model with monteclora.get_peft_model, and give trainers the wrapped model.",
        )


PEFT_TYPE_TO_CONFIG_MAPPING[cast(PeftType, OWN_TYPE)] = MonteCLoRAConfig
PEFT_TYPE_TO_TUNER_MAPPING[cast(PeftType, OWN_TYPE)] = _Refusal
PEFT_TYPE_TO_PREFIX_MAPPING[cast(PeftType, OWN_TYPE)] = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA]
