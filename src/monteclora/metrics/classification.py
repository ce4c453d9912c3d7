"""How good predicted class probabilities are.

Every metric takes ``probs``, float (B, C), each row a distribution over C >= 2 classes, and ``labels``,
int (B,) in 0 .. C-1, and raises ``DataError`` naming what is wrong with either. The predicted class is the
most probable one (the lowest index on a tie). Computation is in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from monteclora.metrics.checks import FloatArray, checked

__all__ = ["accuracy", "brier", "f1", "matthews", "nll", "nll_per_example"]

# The smallest normal float32: no probability a float32 softmax reports is altered, only an underflowed 0 is.
SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)


def accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Share of examples whose most probable class is the label, in [0, 1]."""
    p, y = checked(probs, labels)
    return float(np.mean(p.argmax(axis=1) == y))


def f1(probs: ArrayLike, labels: ArrayLike) -> float:
    """F1 of class 1 for two classes, else the unweighted mean over classes (macro), in [0, 1].

    The macro mean runs over the classes that occur among labels or predictions, as in scikit-learn. Where
    precision or recall is undefined, or both are 0, F1 is 0.
    """
    from sklearn.metrics import f1_score  # half a second of imports that recipes need not wait for

    p, y = checked(probs, labels)
    average = "binary" if p.shape[1] == 2 else "macro"
    return float(f1_score(y, p.argmax(axis=1), average=average, zero_division=0.0))


def matthews(probs: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation coefficient, multi-class (Gorodkin 2004), in [-1, 1]; 0 where it is undefined."""
    from sklearn.metrics import matthews_corrcoef

    p, y = checked(probs, labels)
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
    p, y = checked(probs, labels)
    of_label = p[np.arange(len(y)), y]
    return -np.log(np.clip(of_label, SMALLEST_PROBABILITY, 1.0))


def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """Brier score in its original multi-class sum form (Brier 1950), in [0, 2].

    The mean over examples of ``sum_c (probs[b, c] - [labels[b] = c])^2``. For two classes this is twice the
    score of class 1 alone, which ``sklearn.metrics.brier_score_loss`` reports by default.
    """
    p, y = checked(probs, labels)
    target = np.zeros_like(p)
    target[np.arange(len(y)), y] = 1.0
    return float(np.square(p - target).sum(axis=1).mean())
