"""How well confidence matches accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from monteclora.errors import ConfigError
from monteclora.metrics.checks import FloatArray, IntArray, checked

__all__ = ["DEFAULT_BINS", "ReliabilityCurve", "expected_calibration_error", "reliability_curve"]

DEFAULT_BINS = 15


@dataclass(frozen=True)
class ReliabilityCurve:
    """Confidence against accuracy, bin by bin, over M equal-width bins.

    Attributes:
        edges: float64 (M + 1,), from 0 to 1; bin m holds ``edges[m] < confidence <= edges[m + 1]``.
        counts: int64 (M,), examples in the bin.
        confidence: float64 (M,), mean probability of the predicted class in the bin; NaN in an empty bin.
        accuracy: float64 (M,), share of correct predictions in the bin; NaN in an empty bin.
    """

    edges: FloatArray
    counts: IntArray
    confidence: FloatArray
    accuracy: FloatArray

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]: the mean of |accuracy - confidence|, weighted by counts."""
        used = self.counts > 0
        gaps = np.abs(self.accuracy[used] - self.confidence[used])
        return float(np.average(gaps, weights=self.counts[used]))


def reliability_curve(probs: ArrayLike, labels: ArrayLike, bins: int = DEFAULT_BINS) -> ReliabilityCurve:
    """Bin examples by the probability of their predicted class (Guo et al. 2017, section 2).

    Raises:
        DataError: ``probs`` or ``labels`` is malformed.
        ConfigError: ``bins`` is below 1.
    """
    p, y = checked(probs, labels)
    if bins < 1:
        raise ConfigError(f"bins is {bins}; at least 1 is needed", "Use the default of 15, or another count.")
    edges = np.linspace(0.0, 1.0, bins + 1)
    confidence = np.clip(p.max(axis=1), 0.0, 1.0)
    correct = (p.argmax(axis=1) == y).astype(np.float64)
    # Comparing with the edges themselves keeps a confidence that lies on one in the bin it closes.
    bin_of = np.searchsorted(edges, confidence, side="left") - 1
    counts = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bin_of, weights=confidence, minlength=bins) / counts
        mean_accuracy = np.bincount(bin_of, weights=correct, minlength=bins) / counts
    return ReliabilityCurve(edges, counts, mean_confidence, mean_accuracy)


def expected_calibration_error(probs: ArrayLike, labels: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """Expected calibration error of the predicted class, in [0, 1].

    Equal-width bins on top-1 confidence: Naeini, Cooper & Hauskrecht, "Obtaining well calibrated
    probabilities using Bayesian binning", AAAI 2015, in the multi-class form of Guo et al., "On calibration
    of modern neural networks", ICML 2017, with its 15 bins as default.

    Raises:
        DataError: ``probs`` or ``labels`` is malformed.
        ConfigError: ``bins`` is below 1.
    """
    return reliability_curve(probs, labels, bins).ece
