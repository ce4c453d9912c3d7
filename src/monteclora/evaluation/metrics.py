"""How good, and how well calibrated, predicted class probabilities are.

Every metric takes ``probs``, float (B, C), each row a distribution over C >= 2 classes, and ``labels``,
int (B,) in 0 .. C-1, and raises ``DataError`` naming what is wrong with either. The predicted class is the
most probable one (the lowest index on a tie). Computation is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from monteclora.errors import ConfigError, DataError

__all__ = [
    "DEFAULT_BINS",
    "Interval",
    "ReliabilityCurve",
    "accuracy",
    "bootstrap_interval",
    "brier",
    "classification_metrics",
    "expected_calibration_error",
    "f1",
    "matthews",
    "nll",
    "nll_per_example",
    "reliability_curve",
]

DEFAULT_BINS = 15

# The smallest normal float32: no probability a float32 softmax reports is altered, only an underflowed 0 is.
SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)

# Half-precision softmax rows miss 1 by this much; logits and unnormalised scores miss it by far more.
ROW_SUM_TOLERANCE = 1e-2

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Share of examples whose most probable class is the label, in [0, 1]."""
    p, y = _checked(probs, labels)
    return float(np.mean(p.argmax(axis=1) == y))


def f1(probs: ArrayLike, labels: ArrayLike) -> float:
    """F1 of class 1 for two classes, else the unweighted mean over classes (macro), in [0, 1].

    The macro mean runs over the classes that occur among labels or predictions, as in scikit-learn. Where
    precision or recall is undefined, or both are 0, F1 is 0.
    """
    p, y = _checked(probs, labels)
    average = "binary" if p.shape[1] == 2 else "macro"
    return float(f1_score(y, p.argmax(axis=1), average=average, zero_division=0.0))


def matthews(probs: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation coefficient, multi-class (Gorodkin 2004), in [-1, 1]; 0 where it is undefined."""
    p, y = _checked(probs, labels)
    predicted = p.argmax(axis=1)
    if len(np.union1d(y, predicted)) == 1:
        return 0.0  # what scikit-learn returns as well, with a warning
    return float(matthews_corrcoef(y, predicted))


def nll(probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean negative log-likelihood of the labels, in nats (see ``nll_per_example`` for the clip)."""
    return float(nll_per_example(probs, labels).mean())


def nll_per_example(probs: ArrayLike, labels: ArrayLike) -> FloatArray:
    """Negative log-likelihood of each label, in nats, float64 (B,).

    Probabilities are clipped below at the smallest normal float32, 1.2e-38: an underflowed 0 costs 87.3 nats
    rather than infinity, and no other value changes.
    """
    p, y = _checked(probs, labels)
    of_label = p[np.arange(len(y)), y]
    return -np.log(np.clip(of_label, SMALLEST_PROBABILITY, 1.0))


def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """Brier score in its original multi-class sum form (Brier 1950), in [0, 2].

    The mean over examples of ``sum_c (probs[b, c] - [labels[b] = c])^2``. For two classes this is twice the
    score of class 1 alone, which ``sklearn.metrics.brier_score_loss`` reports by default.
    """
    p, y = _checked(probs, labels)
    target = np.zeros_like(p)
    target[np.arange(len(y)), y] = 1.0
    return float(np.square(p - target).sum(axis=1).mean())


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
    p, y = _checked(probs, labels)
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


def classification_metrics(probs: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """All of the above by name: ``accuracy``, ``f1``, ``mcc``, ``nll``, ``brier``, ``ece`` (15 bins)."""
    p, y = _checked(probs, labels)
    return {
        "accuracy": accuracy(p, y),
        "f1": f1(p, y),
        "mcc": matthews(p, y),
        "nll": nll(p, y),
        "brier": brier(p, y),
        "ece": expected_calibration_error(p, y),
    }


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that covers it with probability ``level``."""

    mean: float
    low: float
    high: float
    level: float


def bootstrap_interval(values: ArrayLike, seed: int, level: float = 0.95, resamples: int = 2000) -> Interval:
    """Percentile bootstrap interval for the mean of per-example ``values``, float (B,), B >= 2 (Efron 1979).

    To compare two methods on the same examples, pass the difference of their per-example values: resampling
    examples then resamples pairs, and what makes an example hard for both methods cancels.

    Args:
        values: finite, one per example.
        seed: of the resampling alone; equal arguments give equal intervals.
        level: coverage, strictly between 0 and 1.
        resamples: bootstrap samples drawn, at least 1.

    Raises:
        DataError: ``values`` is not a finite 1-D array of at least two numbers.
        ConfigError: ``level`` or ``resamples`` is out of range.
    """
    x = _floats("values", values)
    if x.ndim != 1 or len(x) < 2:
        raise DataError(f"values has shape {x.shape}; expected (B,) with B >= 2", "Pass one value for each example.")
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level is {level}; expected a value between 0 and 1", "Use 0.95 for a 95 % interval.")
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; at least 1 is needed", "Use the default of 2000.")
    interval = stats.bootstrap(
        (x,),
        np.mean,
        n_resamples=resamples,
        batch=100,  # bounds memory at 100 x B numbers
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(x.mean()), float(interval.low), float(interval.high), level)


def _checked(probs: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, IntArray]:
    """``probs`` as float64 (B, C) and ``labels`` as int64 (B,), or a ``DataError`` naming the wrong row."""
    p = _floats("probs", probs)
    if p.ndim != 2 or p.shape[0] == 0 or p.shape[1] < 2:
        raise DataError(
            f"probs has shape {p.shape}; expected (B, C) with B >= 1 examples and C >= 2 classes",
            "Pass one row of class probabilities for each example.",
        )
    outside = (p < 0.0) | (p > 1.0 + ROW_SUM_TOLERANCE)
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise DataError(
            f"probs[{row}, {column}] is {p[row, column]:g}; expected a probability between 0 and 1",
            "Apply softmax to logits first.",
        )
    sums = p.sum(axis=1)
    unnormalised = np.abs(sums - 1.0) > ROW_SUM_TOLERANCE
    if unnormalised.any():
        row = int(np.flatnonzero(unnormalised)[0])
        raise DataError(
            f"probs[{row}] sums to {sums[row]:g}; expected 1",
            "Normalise each row over the classes.",
        )
    return p, _checked_labels(labels, examples=p.shape[0], classes=p.shape[1])


def _checked_labels(labels: ArrayLike, examples: int, classes: int) -> IntArray:
    y = np.asarray(labels)
    if y.shape != (examples,):
        raise DataError(
            f"labels has shape {y.shape}; expected ({examples},) to match probs",
            "Pass one label for each row of probs.",
        )
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"labels has type {y.dtype}; expected integers", "Pass class indices.")
    wrong = (y < 0) | (y >= classes)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"labels[{row}] is {y[row]}; expected 0 to {classes - 1} for {classes} classes",
            "Number the classes from 0, and drop unlabelled examples.",
        )
    return y.astype(np.int64)


def _floats(name: str, values: ArrayLike) -> FloatArray:
    try:
        x = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name} is not a rectangular array of numbers", f"Pass {name} as floats.") from None
    if not np.isfinite(x).all():
        where = ", ".join(str(int(i)) for i in np.argwhere(~np.isfinite(x))[0])
        raise DataError(
            f"{name}[{where}] is not finite", "Look for a diverged model or a missing value in what made it."
        )
    return x
