"""The mathematics: what is drawn, from what, and how far it is from the prior. Needs torch only."""

from monteclora.posterior.posterior import (
    AdapterPosterior,
    Draw,
    LayerDraw,
    LayerShape,
    PosteriorSettings,
    Regulariser,
)

__all__ = ["AdapterPosterior", "Draw", "LayerDraw", "LayerShape", "PosteriorSettings", "Regulariser"]
