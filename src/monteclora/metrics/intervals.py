"""How far a mean over examples can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from monteclora.errors import ConfigError, DataError
from monteclora.metrics.checks import floats

__all__ = ["Interval", "bootstrap_interval"]


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
    from scipy import stats

    x = floats("values", values)
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
