"""How good predicted scores and their variances are.

Every metric takes ``mean`` and ``variance``, float (B,), of a normal predictive distribution of each score, and
``scores``, float (B,); it raises ``DataError`` naming what is wrong with them. Computation is in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from monteclora.errors import DataError
from monteclora.metrics.checks import FloatArray, floats

__all__ = ["INTERVAL", "coverage", "gaussian_nll", "gaussian_nll_per_example", "mae", "r2", "rmse", "spearman"]

INTERVAL = 0.9
"""The probability of the central interval whose coverage is measured."""


def rmse(mean: ArrayLike, variance: ArrayLike, scores: ArrayLike) -> float:
    """Root of the mean squared error, in the unit of the scores."""
    m, _, y = _checked(mean, variance, scores)
    return float(np.sqrt(np.mean(np.square(m - y))))


def mae(mean: ArrayLike, variance: ArrayLike, scores: ArrayLike) -> float:
    """Mean absolute error, in the unit of the scores."""
    m, _, y = _checked(mean, variance, scores)
    return float(np.mean(np.abs(m - y)))


def r2(mean: ArrayLike, variance: ArrayLike, scores: ArrayLike) -> float:
    """Coefficient of determination, at most 1: the share of the scores' variance that the mean explains.

    0 where all scores are equal, and nothing can be explained.
    """
    m, _, y = _checked(mean, variance, scores)
    if np.ptp(y) == 0:
        return 0.0
    return float(1.0 - np.square(m - y).sum() / np.square(y - y.mean()).sum())


def spearman(mean: ArrayLike, variance: ArrayLike, scores: ArrayLike) -> float:
    """Spearman's rank correlation, in [-1, 1]; 0 where all means or all scores are equal."""
    m, _, y = _checked(mean, variance, scores)
    if np.ptp(m) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(stats.spearmanr(m, y).statistic)


def gaussian_nll(mean: ArrayLike, variance: ArrayLike, scores: ArrayLike) -> float:
    """Mean of :func:`gaussian_nll_per_example`."""
    return float(gaussian_nll_per_example(mean, variance, scores).mean())


def gaussian_nll_per_example(mean: ArrayLike, variance: ArrayLike, scores: ArrayLike) -> FloatArray:
    """Negative log-density of each score under its normal distribution, in nats, float64 (B,); it may be negative."""
    m, v, y = _checked(mean, variance, scores)
    nll: FloatArray = 0.5 * (np.log(2 * np.pi * v) + np.square(y - m) / v)
    return nll


def coverage(mean: ArrayLike, variance: ArrayLike, scores: ArrayLike, level: float = INTERVAL) -> float:
    """Share of scores inside the central interval of probability ``level``, in [0, 1]; calibrated where it is that."""
    m, v, y = _checked(mean, variance, scores)
    return float(np.mean(np.abs(y - m) <= stats.norm.ppf(0.5 + level / 2) * np.sqrt(v)))


def _checked(mean: ArrayLike, variance: ArrayLike, scores: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    m, v, y = floats("mean", mean), floats("variance", variance), floats("scores", scores)
    if m.ndim != 1 or not len(m) or not m.shape == v.shape == y.shape:
        raise DataError(
            f"mean, variance and scores have the shapes {m.shape}, {v.shape} and {y.shape}; expected the same (B,)",
            "Pass one of each for every example.",
        )
    if not (v > 0).all():
        row = int(np.flatnonzero(v <= 0)[0])
        raise DataError(f"variance[{row}] is {v[row]:g}; expected a number above 0", "Pass variances.")
    return m, v, y
