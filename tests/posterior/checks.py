"""The statistical verdicts of these tests, at fixed levels.

A verdict is worth something only if it can be negative: every test of a law has a companion that plants an error and
expects :class:`AssertionError` from the very same check.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kstwobign

COUNT = 200_000
SEEDS = (1, 2, 3)
LEVEL = 1e-4
STANDARD_ERRORS = 4.0

Cdf = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def ks_p_value(sample: ArrayLike, law: Cdf | NDArray[np.float64]) -> float:
    """The Kolmogorov-Smirnov p-value (asymptotic) of a sample against a continuous CDF or a sorted second sample."""
    values = np.sort(np.asarray(sample, dtype=np.float64).ravel())
    size = len(values)
    if callable(law):
        # at every 16th value and linear between: some CDFs are slow, and this is within 1e-4 of them
        knots = np.union1d(values[::16], values[-1:])
        below = upto = np.interp(values, knots, law(knots))
        effective = float(size)
    else:
        below = np.searchsorted(law, values, side="left") / len(law)
        upto = np.searchsorted(law, values, side="right") / len(law)
        effective = size * len(law) / (size + len(law))
    ranks = np.arange(size + 1) / size
    distance = max(np.max(ranks[1:] - upto), np.max(below - ranks[:-1]))
    return float(kstwobign.sf(distance * np.sqrt(effective)))


def assert_law(sample: ArrayLike, law: Cdf | NDArray[np.float64], what: str = "sample") -> None:
    """The sample follows the law: Kolmogorov-Smirnov at :data:`LEVEL`."""
    p_value = ks_p_value(sample, law)
    assert p_value > LEVEL, f"{what}: Kolmogorov-Smirnov p-value {p_value:.1e}"


def assert_mean(values: ArrayLike, expected: ArrayLike, what: str = "mean") -> None:
    """The mean over the first axis is ``expected`` within :data:`STANDARD_ERRORS` standard errors, in every entry."""
    numbers = np.asarray(values, dtype=np.float64)
    error = numbers.std(axis=0, ddof=1) / np.sqrt(len(numbers))
    distance = np.abs(numbers.mean(axis=0) - np.asarray(expected, dtype=np.float64))
    # an entry that never varies has no sampling error, only rounding
    bound = STANDARD_ERRORS * error + 1e-12 * np.abs(numbers).max(initial=0.0)
    assert np.all(distance <= bound), f"{what}: off by {np.max(distance / (error + 1e-300)):.1f} standard errors"
