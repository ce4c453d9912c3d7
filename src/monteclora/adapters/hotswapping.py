"""peft's hot-swapping writes another mean into an adapter, past every check of a model: not where it has a posterior.

There is no hook for it. ``hotswap_adapter`` and its low level, which diffusers calls as well, both end in one function
of ``peft.utils.hotswap``, and look it up when they are called: it is replaced there by one that asks first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from peft.utils import hotswap
from torch import nn

from monteclora.adapters.tuner import MonteCLoRATuner
from monteclora.errors import ConfigError

__all__ = ["refuse_posteriors"]


def refuse_posteriors() -> None:
    """Have peft's hot-swapping refuse adapters with a posterior; what has none is swapped as ever."""
    swap: Callable[..., None] = hotswap.hotswap_adapter_from_state_dict
    if hasattr(swap, "__wrapped__"):
        return

    @wraps(swap)
    def asking_first(model: nn.Module, state_dict: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, MonteCLoRATuner) and module.posterior(adapter_name) is not None:
                raise ConfigError(
                    f"adapter '{adapter_name}' has a posterior, which would be paired with another mean",
                    "Exchange both with model.load_adapter(folder, name), or load under another name.",
                )
        swap(model, state_dict, adapter_name, *args, **kwargs)

    hotswap.hotswap_adapter_from_state_dict = asking_first
