"""How well confidence matches accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import fft, optimize, stats
from scipy.special import log_softmax

from monteclora.errors import ConfigError
from monteclora.metrics.checks import FloatArray, IntArray, checked
from monteclora.metrics.classification import SMALLEST_PROBABILITY

__all__ = [
    "DEFAULT_BINS",
    "Binning",
    "BrierParts",
    "ReliabilityCurve",
    "best_temperature",
    "brier_decomposition",
    "classwise_calibration_error",
    "equal_mass_calibration_error",
    "expected_calibration_error",
    "fitted_temperature",
    "reliability_curve",
    "smooth_calibration_error",
    "smoothed_nll",
    "tempered_nll",
]

DEFAULT_BINS = 15
_LOG_TEMPERATURES = (-4.0, 4.0)  # within them every NLL of a float32 model is decided
_CELLS = 2048  # of [0, 1] for the smooth calibration error: finer changes the fourth decimal at most

Binning = Literal["width", "mass"]
"""Bins of equal width, or bins that hold about the same number of examples."""


@dataclass(frozen=True)
class ReliabilityCurve:
    """Confidence against accuracy, bin by bin, over M bins.

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

    def accuracy_interval(self, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Clopper-Pearson interval of each bin's accuracy, two float64 arrays (M,); NaN in an empty bin."""
        used = self.counts > 0
        low, high = np.full((2, len(self.counts)), np.nan)
        right = np.rint(self.accuracy[used] * self.counts[used])
        wrong, tail = self.counts[used] - right, (1 - level) / 2
        # a beta distribution with a parameter of 0 is the point at its end of [0, 1]
        low[used] = np.where(right > 0, stats.beta.ppf(tail, np.maximum(right, 1), wrong + 1), 0.0)
        high[used] = np.where(wrong > 0, stats.beta.ppf(1 - tail, right + 1, np.maximum(wrong, 1)), 1.0)
        return low, high


def reliability_curve(
    probs: ArrayLike, labels: ArrayLike, bins: int = DEFAULT_BINS, binning: Binning = "width"
) -> ReliabilityCurve:
    """Bin examples by the probability of their predicted class (Guo et al. 2017, section 2).

    Raises:
        DataError: ``probs`` or ``labels`` is malformed.
        ConfigError: ``bins`` is below 1.
    """
    p, y = checked(probs, labels)
    confidence = np.clip(p.max(axis=1), 0.0, 1.0)
    return _curve(confidence, (p.argmax(axis=1) == y).astype(np.float64), bins, binning)


def _curve(confidence: FloatArray, correct: FloatArray, bins: int, binning: Binning = "width") -> ReliabilityCurve:
    """The curve of probabilities (B,) in [0, 1] of an event against whether it happened, (B,) of 0 and 1."""
    edges = _edges(confidence, bins, binning)
    bin_of = _bin_of(confidence, edges)
    counts = np.bincount(bin_of, minlength=len(edges) - 1)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bin_of, weights=confidence, minlength=len(counts)) / counts
        mean_accuracy = np.bincount(bin_of, weights=correct, minlength=len(counts)) / counts
    return ReliabilityCurve(edges, counts, mean_confidence, mean_accuracy)


def _edges(confidence: FloatArray, bins: int, binning: Binning) -> FloatArray:
    if bins < 1:
        raise ConfigError(f"bins is {bins}; at least 1 is needed", "Use the default of 15, or another count.")
    if binning == "width":
        return np.linspace(0.0, 1.0, bins + 1)
    inner = np.quantile(confidence, np.arange(1, bins) / bins, method="inverted_cdf")
    return np.unique(np.concatenate([[0.0], inner, [1.0]]))  # examples of the same confidence share a bin


def _bin_of(confidence: FloatArray, edges: FloatArray) -> IntArray:
    # Comparing with the edges themselves keeps a confidence that lies on one in the bin it closes.
    return np.maximum(np.searchsorted(edges, confidence, side="left") - 1, 0)


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


def equal_mass_calibration_error(probs: ArrayLike, labels: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """As :func:`expected_calibration_error`, over bins that hold the same number of examples (Nixon et al. 2019).

    Its bias depends less on how confidences are spread: no bin has only a few examples.
    """
    return reliability_curve(probs, labels, bins, "mass").ece


def classwise_calibration_error(probs: ArrayLike, labels: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """Mean over classes of the calibration error of that class's probability, in [0, 1] (Kull et al. 2019).

    It sees what the error of the predicted class alone does not: probabilities of the other classes that are off.
    """
    p, y = checked(probs, labels)
    errors = [_curve(np.clip(p[:, c], 0, 1), (y == c).astype(np.float64), bins).ece for c in range(p.shape[1])]
    return float(np.mean(errors))


def smooth_calibration_error(probs: ArrayLike, labels: ArrayLike) -> float:
    """Smooth calibration error of the predicted class, in [0, 1] (Blasiok & Nakkiran, ICLR 2024).

    ``smECE_sigma`` is the integral over [0, 1] of the absolute value of the residuals (correct - confidence), smoothed
    by a Gaussian of width sigma that is reflected at 0 and 1; the error is the sigma that equals its own
    ``smECE_sigma``. Unlike binned errors it is continuous in the predictions and has no bins to choose.
    """
    p, y = checked(probs, labels)
    confidence = np.clip(p.max(axis=1), 0.0, 1.0)
    residuals = (p.argmax(axis=1) == y) - confidence
    cells = np.minimum((confidence * _CELLS).astype(np.int64), _CELLS - 1)
    density = np.bincount(cells, weights=residuals, minlength=_CELLS) / len(y) * _CELLS
    # the reflected Gaussian is the heat kernel of the interval, which the cosine transform makes diagonal
    spectrum, frequencies = fft.dct(density, norm="ortho"), np.pi * np.arange(_CELLS)

    def smoothed(sigma: float) -> float:
        return float(np.abs(fft.idct(spectrum * np.exp(-0.5 * (frequencies * sigma) ** 2), norm="ortho")).mean())

    if smoothed(0.0) == 0.0:
        return 0.0
    # smoothed falls from at most 1 at sigma = 0, so that its graph meets the diagonal once
    return float(optimize.brentq(lambda sigma: sigma - smoothed(sigma), 0.0, 1.0, xtol=1e-7))


@dataclass(frozen=True)
class BrierParts:
    """``brier = reliability - resolution + uncertainty`` (Murphy 1973), summed over classes.

    Attributes:
        reliability: squared distance between probability and frequency, bin by bin; 0 where calibrated.
        resolution: how far the frequencies of the bins are from the overall frequency: what the model tells apart.
        uncertainty: the score of always predicting the overall frequencies; the data's, not the model's.
    """

    reliability: float
    resolution: float
    uncertainty: float


def brier_decomposition(probs: ArrayLike, labels: ArrayLike, bins: int = DEFAULT_BINS) -> BrierParts:
    """The parts of the Brier score in its sum form (``metrics.brier``), in equal-width bins of each class's p.

    The variation within bins counts to the resolution (Stephenson, Coelho & Jolliffe 2008), so that the parts add up
    to the score exactly, whatever the bins.
    """
    p, y = checked(probs, labels)
    reliability = uncertainty = score = 0.0
    for c in range(p.shape[1]):
        of_class, happened = np.clip(p[:, c], 0, 1), (y == c).astype(np.float64)
        curve = _curve(of_class, happened, bins)
        used = curve.counts > 0
        weights = curve.counts[used] / len(y)
        reliability += float(weights @ np.square(curve.confidence[used] - curve.accuracy[used]))
        uncertainty += float(happened.mean() * (1 - happened.mean()))
        score += float(np.square(of_class - happened).mean())
    return BrierParts(reliability, reliability + uncertainty - score, uncertainty)


def tempered_nll(probs: ArrayLike, labels: ArrayLike) -> float:
    """The NLL in nats of ``softmax(log(probs) / T)`` at the :func:`fitted_temperature` T of these very examples.

    What the predictions are worth apart from their overall confidence, as the calibrated log-likelihood of Ashukha et
    al. (2020, arXiv 2002.06470), whose T comes from other examples: one number is fitted here, so that of few examples
    the value is a little too good.

    Raises:
        DataError: ``probs`` or ``labels`` is malformed.
    """
    p, y = checked(probs, labels)
    logs = np.log(np.clip(p, SMALLEST_PROBABILITY, 1.0))
    scaled = log_softmax(logs / fitted_temperature(logs, y), axis=1)
    return float(-scaled[np.arange(len(y)), y].mean())


def fitted_temperature(logits: FloatArray, labels: IntArray) -> float:
    """The T with the smallest :func:`smoothed_nll` of ``softmax(logits / T)``, to six digits.

    As Guo et al. (2017, arXiv 1706.04599, section 4.2) fit it, but for the smoothing: where the label is the most
    probable class of every row, the plain NLL has no minimum, and T would be 0.

    Args:
        logits: (B, C).
        labels: (B,).
    """
    return best_temperature(lambda temperature: smoothed_nll(log_softmax(logits / temperature, axis=1), labels))


def smoothed_nll(log_probs: FloatArray, labels: IntArray) -> float:
    """The mean NLL in nats, as if a row in B + 1 had no class in particular.

    Platt (1999, section 2.2) smooths the targets of a calibration for the same reason, with two rows in place of one.

    Args:
        log_probs: (B, C).
        labels: (B,).
    """
    share = 1 / (len(labels) + 1)
    of_label = log_probs[np.arange(len(labels)), labels]
    return float(-((1 - share) * of_label + share * log_probs.mean(axis=1)).mean())


def best_temperature(objective: Callable[[float], float]) -> float:
    """The positive temperature with the smallest value of a function that has one minimum, to six digits."""
    found = optimize.minimize_scalar(
        lambda logarithm: objective(float(np.exp(logarithm))),
        bounds=_LOG_TEMPERATURES,
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))
