"""Offloaded weights: on the meta device, except while accelerate's hooks have them back for the call of their layer.

Draws are made of all layers' rho and eta before any layer runs, and a drawn layer reads A without calling it. Nor has
what is trained there a gradient to keep: of plain LoRA too, some such models silently train nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from accelerate.utils import has_offloaded_params
from torch import Tensor, nn

from monteclora.errors import ConfigError
from monteclora.posterior import AdapterPosterior

__all__ = ["check_base", "check_here"]

_HINT = "Keep the adapted layers on a device: leave them out of cpu_offload, disk_offload and device_map."


def check_base(name: str, layer: nn.Module) -> None:
    """Check a layer that is to be adapted.

    Raises:
        ConfigError: its weight is offloaded.
    """
    if has_offloaded_params(layer):
        raise ConfigError(f"target module '{name}' is offloaded, and MonteCLoRA draws before any layer runs", _HINT)


def check_here(posterior: AdapterPosterior, layers: Iterable[tuple[str, Tensor | None]], model: nn.Module) -> None:
    """Check that accelerate has offloaded nothing of an adapter since it was made.

    Args:
        posterior: the adapter's.
        layers: its layers' names, each with A where it is available.
        model: has the layers.

    Raises:
        ConfigError: rho and eta, or an A, are.
    """
    if posterior.rho.is_meta:
        raise ConfigError(
            "rho and eta of the adapter are offloaded (on the meta device), and draws are made before any layer runs",
            _HINT,
        )
    for name, weight in layers:
        # whoever else moves A has it back when its layer runs, as the parameter that it was
        if weight is not None and weight.is_meta and any(map(has_offloaded_params, model.modules())):
            raise ConfigError(
                f"the adapter's weights of '{name}' are offloaded (on the meta device), and draws are made before any "
                "layer runs",
                _HINT,
            )
