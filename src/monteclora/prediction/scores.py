"""Scores as distributions: each draw gives a normal one, with the variance that the model itself expects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from monteclora.prediction.forward import FloatArray

__all__ = ["OUTPUTS", "ScorePredictions", "mean_and_variance"]

OUTPUTS = ("mean", "raw_variance")
"""What the two outputs of the head are."""
_SMALLEST_VARIANCE = 1e-4  # of standardised scores: a hundredth of their standard deviation
_ONE = math.log(math.e - 1)  # softplus of it is 1: a head of zeros predicts the distribution of the training scores


def mean_and_variance(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The normal distribution that a head's outputs, (..., 2), stand for: mean and variance, (...) each.

    The variance is softplus(raw), shifted to be 1 for 0, and bounded below: unlike an exponential, it neither
    overflows nor makes the gradient of a badly predicted row explode (Lakshminarayanan et al. 2017, section 2.2.1).
    """
    mean, raw = outputs.unbind(-1)
    return mean, nn.functional.softplus(raw + _ONE) + _SMALLEST_VARIANCE


@dataclass(frozen=True)
class ScorePredictions:
    """S normal distributions of the score of each of B rows.

    Attributes:
        means: float64, shape (S, B), in the unit of the scores.
        variances: float64, shape (S, B), above 0, in the square of that unit.
        scores: the right ones, float64, shape (B,); None where they are unknown.
    """

    means: FloatArray
    variances: FloatArray
    scores: NDArray[np.float64] | None = None

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.means)

    @cached_property
    def mean(self) -> FloatArray:
        """Of the mixture of the draws, shape (B,)."""
        found: FloatArray = self.means.mean(0)
        return found

    @property
    def total(self) -> FloatArray:
        """Variance of the mixture, shape (B,): the sum of the two below, by the law of total variance."""
        return self.aleatoric + self.epistemic

    @cached_property
    def aleatoric(self) -> FloatArray:
        """mean_s variance_s, shape (B,): what the texts leave open under every draw."""
        found: FloatArray = self.variances.mean(0)
        return found

    @cached_property
    def epistemic(self) -> FloatArray:
        """The variance over draws of mean_s, shape (B,), 0 for S = 1: what the draws do not agree on."""
        found: FloatArray = self.means.var(0)
        return found

    def interval(self, level: float) -> tuple[FloatArray, FloatArray]:
        """Ends of the central interval of the normal distribution with this mean and variance, shape (B,) each."""
        half = stats.norm.ppf(0.5 + level / 2) * np.sqrt(self.total)
        return self.mean - half, self.mean + half
