"""LoRA (Hu et al. 2022): a trained low-rank update of frozen linear layers; the baseline of every comparison."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from monteclora.config import brief
from monteclora.errors import ConfigError
from monteclora.methods.adapters import AdapterMethod
from monteclora.methods.base import MethodOptions, TaskKind

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

__all__ = [
    "LoRA",
    "LoRAFields",
    "LoRAMethod",
    "LoRAOptions",
    "TargetFields",
    "check_names",
    "lora_arguments",
    "peft_task",
    "put_adapter",
    "seed_everything",
]

_ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class TargetFields(MethodOptions):
    """Which layers an adapter is put on.

    Args:
        target_modules: the layers that get an adapter: names such as ``q_proj``, a regular expression for whole names,
            or ``all-linear`` for every linear layer but the head; null is peft's choice for the architecture, or
            ``all-linear`` where it has none.
        exclude_modules: layers that get none, even though ``target_modules`` names them: names, or a regular expression
            for whole names.
        modules_to_save: layers that are trained and saved whole; a classification head always is.
    """

    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values: pairs of field and message, see :mod:`monteclora.config`."""
        patterns = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        found = [
            (name, f"is {brief(value)}, which is no regular expression; of names write a list")
            for name, value in patterns.items()
            if isinstance(value, str) and value and not _is_pattern(value)
        ]
        found += [
            (name, "is empty: name a layer, or leave it out")
            for name, value in patterns.items()
            if value == "" or (value == [] and name == "target_modules")
        ]
        return found

    def targets(self, model: PreTrainedModel, choices: Mapping[str, Any]) -> list[str] | str | None:
        """``target_modules`` for peft, which has ``choices`` of its own by architecture."""
        if self.target_modules is None and model.config.model_type not in choices:
            return _ALL_LINEAR
        return self.target_modules

    def module_arguments(self) -> dict[str, Any]:
        """The other fields as arguments of a configuration of peft."""
        return {
            "exclude_modules": self.exclude_modules or None,
            "modules_to_save": list(self.modules_to_save) or None,
        }


@dataclass(frozen=True)
class LoRAFields(TargetFields):
    """The options that LoRA shares with the methods built on it.

    Args:
        r: the rank of the update.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: the share of the adapter's inputs set to zero in training.
        rank_pattern: other ranks for some layers, by name or regular expression.
        alpha_pattern: other values of ``lora_alpha`` for some layers.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead (Kalajdzievski 2023).
    """

    r: int = 8
    lora_alpha: int | float = 16
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    use_rslora: bool = False

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values: pairs of field and message, see :mod:`monteclora.config`."""
        found = super().problems() + [
            (name, f"is {value}, expected {bound}")
            for name, value, bound, holds in (
                ("r", self.r, "at least 1", self.r >= 1),
                ("lora_alpha", self.lora_alpha, "above 0", self.lora_alpha > 0),
            )
            if not holds
        ]
        if not 0 <= self.lora_dropout < 1:
            found.append(("lora_dropout", f"is {self.lora_dropout}, expected at least 0 and below 1"))
        found += [
            ("rank_pattern", f"gives {key} the value {value}, expected at least 1")
            for key, value in self.rank_pattern.items()
            if value < 1
        ]
        found += [
            ("alpha_pattern", f"gives {key} the value {value}, expected above 0")
            for key, value in self.alpha_pattern.items()
            if not value > 0
        ]
        for name in ("rank_pattern", "alpha_pattern"):
            found += [
                (name, f"has {key!r}, which is neither a name nor a regular expression")
                for key in getattr(self, name)
                if not _is_pattern(key)
            ]
        return found


@dataclass(frozen=True)
class LoRAOptions(LoRAFields):
    """The options of LoRA."""

    name: Literal["lora"] = "lora"


def peft_task(task_kind: TaskKind) -> str:
    """What peft calls the kind of task."""
    return "CAUSAL_LM" if task_kind == "causal_lm" else "SEQ_CLS"


def lora_arguments(options: LoRAFields, model: PreTrainedModel, task_kind: TaskKind) -> dict[str, Any]:
    """The arguments of ``peft.LoraConfig`` that the options stand for."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    return {
        "task_type": peft_task(task_kind),
        "r": options.r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": options.targets(model, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING),
        **options.module_arguments(),
        "rank_pattern": dict(options.rank_pattern),
        "alpha_pattern": dict(options.alpha_pattern),
        "use_rslora": options.use_rslora,
    }


def check_names(options: TargetFields, model: PreTrainedModel) -> None:
    """Check that every layer an option names exists; peft silently ignores those that do not.

    Raises:
        ConfigError: no layer bears the name; the message has the nearest one that exists.
    """
    modules = [name for name, _ in model.named_modules() if name]
    for option in ("target_modules", "exclude_modules", "modules_to_save"):
        names = getattr(options, option) or []
        if isinstance(names, str):
            _require_match(option, names, modules)
        else:
            _require(option, [name for name in names if not _any_ends(modules, name)], modules)
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(options, option, ())
        unmatched = [p for p in patterns if not any(re.match(rf"(.*\.)?({p})$", name) for name in modules)]
        _require(option, unmatched, modules)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _any_ends(modules: Iterable[str], name: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)


def _require_match(option: str, pattern: str, modules: list[str]) -> None:
    if pattern == _ALL_LINEAR or any(re.fullmatch(pattern, module) for module in modules):
        return
    hint = "It is a regular expression for whole names, as model.named_modules() has them."
    if _any_ends(modules, pattern):
        hint = f"A text is a regular expression for whole names; write a list of names: [{pattern}]."
    raise ConfigError(f"method.{option} is {brief(pattern)}, which matches no layer of the model", hint)


def _require(option: str, missing: list[str], modules: list[str]) -> None:
    if missing:
        leaves = sorted({name.rpartition(".")[2] for name in modules})
        near = difflib.get_close_matches(missing[0], leaves, 3, 0.4)
        raise ConfigError(
            f"method.{option} names {missing[0]!r}, and the model has no such layer",
            f"Nearest: {', '.join(near)}." if near else "Name layers as model.named_modules() does.",
        )


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    from transformers import set_seed

    set_seed(seed)


def put_adapter(model: PreTrainedModel, make: Callable[[], PeftConfig], seed: int) -> nn.Module:
    """The model with an adapter, its weights drawn from the seed.

    Args:
        model: is changed in place.
        make: gives the adapter's configuration.
        seed: of the run.

    Raises:
        ConfigError: peft refuses it.
    """
    import peft

    seed_everything(seed)
    try:
        wrapped: nn.Module = peft.get_peft_model(model, make())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"peft refused the adapter: {error}", "Correct the method section.") from error
    return wrapped


class LoRAMethod(AdapterMethod):
    """What LoRA and its relatives in peft have in common; each says in :meth:`arguments` where it differs."""

    def arguments(self, options: Any) -> dict[str, Any]:
        """Arguments of ``peft.LoraConfig`` besides those of :func:`lora_arguments`."""
        return {}

    def wrap(self, model: PreTrainedModel, options: Any, task_kind: TaskKind, seed: int) -> nn.Module:
        """Put the adapter on the model.

        Raises:
            ConfigError: an option names a layer that does not exist or that cannot be adapted.
        """
        import peft

        check_names(options, model)
        arguments = lora_arguments(options, model, task_kind) | self.arguments(options)
        return put_adapter(model, lambda: peft.LoraConfig(**arguments), seed)


class LoRA(LoRAMethod):
    """See :class:`~monteclora.methods.base.Method`."""

    name = "lora"
    description = "low-rank adaptation: a trained update B A of frozen weights"
    options = LoRAOptions
