"""The mathematics: what is drawn, from what, and how far it is from the prior. Needs torch only."""

from monteclora.posterior.draws import Draw, LayerDraw
from monteclora.posterior.layout import LayerShape
from monteclora.posterior.posterior import AdapterPosterior
from monteclora.posterior.regulariser import Regulariser
from monteclora.posterior.settings import PosteriorSettings

__all__ = ["AdapterPosterior", "Draw", "LayerDraw", "LayerShape", "PosteriorSettings", "Regulariser"]
