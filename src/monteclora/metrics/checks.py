"""What every metric checks of its arguments."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from monteclora.errors import DataError

__all__ = ["FloatArray", "IntArray", "checked", "floats"]

# Half-precision softmax rows miss 1 by this much; logits and unnormalised scores miss it by far more.
ROW_SUM_TOLERANCE = 1e-2

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def checked(probs: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, IntArray]:
    """``probs`` as float64 (B, C) and ``labels`` as int64 (B,), or a ``DataError`` naming the wrong row."""
    p = floats("probs", probs)
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
    return p, checked_labels(labels, examples=p.shape[0], classes=p.shape[1])


def checked_labels(labels: ArrayLike, examples: int, classes: int) -> IntArray:
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


def floats(name: str, values: ArrayLike) -> FloatArray:
    """``values`` in float64, any shape; raises DataError where they are no finite numbers, calling them ``name``."""
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
