"""The mathematics: what is drawn, from what, and how far it is from the prior. Needs torch only.

The names are loaded when they are first used: the options in ``settings`` can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monteclora.posterior.draws import Draw, LayerDraw
    from monteclora.posterior.layout import LayerShape
    from monteclora.posterior.posterior import AdapterPosterior
    from monteclora.posterior.regulariser import Regulariser
    from monteclora.posterior.settings import PosteriorSettings

__all__ = ["AdapterPosterior", "Draw", "LayerDraw", "LayerShape", "PosteriorSettings", "Regulariser"]

_HOME = {
    "AdapterPosterior": "posterior",
    "Draw": "draws",
    "LayerDraw": "draws",
    "LayerShape": "layout",
    "PosteriorSettings": "settings",
    "Regulariser": "regulariser",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"monteclora.posterior.{_HOME[name]}"), name)
    raise AttributeError(f"module 'monteclora.posterior' has no attribute '{name}'")
