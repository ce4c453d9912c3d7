"""Every method by name. A new method is a file in this folder and a line here."""

from __future__ import annotations

from monteclora.config import nearest
from monteclora.errors import ConfigError
from monteclora.methods.adalora import AdaLoRA
from monteclora.methods.base import Method
from monteclora.methods.dora import DoRA
from monteclora.methods.full import FullFineTuning
from monteclora.methods.ia3 import IA3
from monteclora.methods.ivon import Ivon
from monteclora.methods.lora import LoRA
from monteclora.methods.loraplus import LoRAPlus
from monteclora.methods.monteclora import MonteCLoRA
from monteclora.methods.peft_monteclora import PeftMonteCLoRA
from monteclora.methods.prompt_tuning import PromptTuning
from monteclora.methods.rslora import RsLoRA

__all__ = ["get_method", "list_methods", "register"]

_METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        FullFineTuning(),
        LoRA(),
        RsLoRA(),
        LoRAPlus(),
        DoRA(),
        AdaLoRA(),
        IA3(),
        PromptTuning(),
        Ivon(),
        PeftMonteCLoRA(),
        MonteCLoRA(),
    )
}


def register(method: Method) -> Method:
    """Add a method, from a package of one's own as well. Raises ConfigError when its name is taken."""
    if method.name in _METHODS:
        raise ConfigError(f"the method {method.name} is registered already", "Choose another name.")
    _METHODS[method.name] = method
    return method


def list_methods() -> tuple[Method, ...]:
    """Every method in alphabetical order."""
    return tuple(_METHODS[name] for name in sorted(_METHODS))


def get_method(name: str) -> Method:
    """The method of that name. Raises ConfigError that names the nearest one."""
    if name not in _METHODS:
        near = nearest(name, _METHODS)
        hint = f"Did you mean {near}?" if near else f"Choose one of {', '.join(sorted(_METHODS))}."
        raise ConfigError(f"there is no method {name!r}", hint)
    return _METHODS[name]
