"""Telling examples unlike the training data from those like it.

A score is float (B,), larger where an example looks less like the training data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from monteclora.errors import ConfigError, DataError
from monteclora.metrics.checks import FloatArray, floats

__all__ = ["auroc", "fpr95", "neighbour_distance"]

_AT_ONCE = 4_000_000  # distances in memory


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """The probability that an outside example's score is larger than an inside one's, ties half; in [0, 1].

    The area under the ROC curve: 0.5 is chance, 1 perfect. Also of wrong (outside) against right (inside) answers.

    Raises:
        DataError: either group is empty or malformed.
    """
    from scipy.stats import rankdata

    low, high = _group("inside", inside), _group("outside", outside)
    ranks = rankdata(np.concatenate([low, high]))[len(low) :]
    return float((ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(low) * len(high)))


def fpr95(inside: ArrayLike, outside: ArrayLike) -> float:
    """The share of outside examples that pass where the threshold lets at least 95 % of inside examples pass.

    Raises:
        DataError: either group is empty or malformed.
    """
    threshold = np.quantile(_group("inside", inside), 0.95, method="inverted_cdf")
    return float(np.mean(_group("outside", outside) <= threshold))


def neighbour_distance(features: ArrayLike, reference: ArrayLike, k: int = 1) -> FloatArray:
    """Mean distance to the k nearest reference rows after scaling all rows to length 1 (Sun et al., ICML 2022).

    Theirs is the distance to the k-th alone.

    Args:
        features: float (B, D).
        reference: float (N, D), N >= 1.
        k: of how many neighbours; of fewer reference rows, all count.

    Returns:
        float64 (B,), in [0, 2].

    Raises:
        DataError: an array is malformed.
        ConfigError: ``k`` is below 1.
    """
    rows, known = _features("features", features), _features("reference", reference)
    if rows.shape[1] != known.shape[1]:
        raise DataError(
            f"features have {rows.shape[1]} columns and the reference {known.shape[1]}", "Take both from one model."
        )
    if k < 1:
        raise ConfigError(f"k is {k}; expected 1 or more", "Use 1.")
    count = min(k, len(known))
    rows, known = _unit(rows), _unit(known)
    found = np.empty(len(rows))
    step = max(1, _AT_ONCE // len(known))
    for first in range(0, len(rows), step):
        cosines = rows[first : first + step] @ known.T
        nearest = np.partition(cosines, len(known) - count, axis=1)[:, len(known) - count :]
        found[first : first + step] = _distance(nearest).mean(1)
    return found


def _distance(cosines: FloatArray) -> FloatArray:
    """Of rows of length 1."""
    found: FloatArray = np.sqrt(np.maximum(2.0 - 2.0 * cosines, 0.0))
    return found


def _group(name: str, values: ArrayLike) -> FloatArray:
    found = floats(name, values)
    if found.ndim != 1 or len(found) == 0:
        raise DataError(f"{name} has shape {found.shape}; expected (B,) with B >= 1", "Pass one score per example.")
    return found


def _features(name: str, values: ArrayLike) -> FloatArray:
    found = floats(name, values)
    if found.ndim != 2 or len(found) == 0:
        raise DataError(f"{name} has shape {found.shape}; expected (B, D) with B >= 1", "Pass one row per example.")
    return found


def _unit(rows: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)
