"""How good the probabilities of several labels of a row are, each of which it has or has not.

Every metric takes ``probs``, float (B, L), the probability of each of L labels, and ``labels``, int (B, L), 1 where the
row has the label and 0 where not, and raises ``DataError`` naming what is wrong with either. A label is predicted where
its probability is above one half. A decision is one label of one row. Computation is in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from monteclora.errors import DataError
from monteclora.metrics.calibration import DEFAULT_BINS, expected_calibration_error
from monteclora.metrics.checks import FloatArray, IntArray, floats
from monteclora.metrics.classification import brier, nll

__all__ = ["decisions", "f1_macro", "f1_micro", "label_brier", "label_ece", "label_nll", "subset_accuracy"]


def decisions(probs: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, IntArray]:
    """The same as B * L examples of two classes: float64 (B * L, 2) and int64 (B * L,), row by row."""
    p, y = _checked(probs, labels)
    flat = p.reshape(-1)
    return np.stack([1.0 - flat, flat], axis=1), y.reshape(-1)


def subset_accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows all of whose labels are predicted right, in [0, 1]."""
    p, y = _checked(probs, labels)
    return float(np.mean(((p > 0.5) == (y == 1)).all(axis=1)))


def f1_micro(probs: ArrayLike, labels: ArrayLike) -> float:
    """F1 of all decisions together, in [0, 1]; 0 where nothing is predicted and no row has a label."""
    return _f1(probs, labels, "micro")


def f1_macro(probs: ArrayLike, labels: ArrayLike) -> float:
    """Unweighted mean of the labels' F1, in [0, 1]; that of a label which no row has and none is predicted is 0."""
    return _f1(probs, labels, "macro")


def label_nll(probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean negative log-likelihood of a decision, in nats, clipped as the one of classes."""
    return nll(*decisions(probs, labels))


def label_brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean Brier score of a decision in its sum form, in [0, 2]."""
    return brier(*decisions(probs, labels))


def label_ece(probs: ArrayLike, labels: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """Expected calibration error of the decisions, in [0, 1]: confidence is the probability of the decision taken."""
    return expected_calibration_error(*decisions(probs, labels), bins)


def _f1(probs: ArrayLike, labels: ArrayLike, average: str) -> float:
    from sklearn.metrics import f1_score  # half a second of imports that recipes need not wait for

    p, y = _checked(probs, labels)
    if p.shape[1] == 1:  # one column would be taken for two classes
        average = "binary"
    return float(f1_score(y, (p > 0.5).astype(np.int64), average=average, zero_division=0.0))


def _checked(probs: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, IntArray]:
    p, y = floats("probs", probs), np.asarray(labels)
    if p.ndim != 2 or not p.size or p.shape != y.shape:
        raise DataError(
            f"probs has shape {p.shape} and labels {y.shape}; expected (B, L) of both",
            "Pass a probability and 0 or 1 for each label of each row.",
        )
    if ((p < 0) | (p > 1)).any():
        row, column = (int(i) for i in np.argwhere((p < 0) | (p > 1))[0])
        raise DataError(f"probs[{row}, {column}] is {p[row, column]:g}; expected a probability", "Apply the sigmoid.")
    if not np.isin(y, (0, 1)).all():
        raise DataError("labels holds another number than 0 and 1", "Pass 1 where a row has the label.")
    return p, y.astype(np.int64)
