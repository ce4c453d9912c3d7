"""How much the rows of each label count in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from monteclora.config import brief, nearest
from monteclora.errors import ConfigError
from monteclora.metrics.checks import FloatArray

__all__ = ["ClassWeights", "class_weights", "label_weights"]

ClassWeights = Literal["balanced"] | Mapping[str, float]


def class_weights(wanted: ClassWeights, names: Sequence[str], labels: ArrayLike) -> tuple[float, ...]:
    """The weight of each class, whose mean over the training rows is 1: the scale of the loss stays what it was.

    ``balanced`` is ``N / (C n_c)``, for N rows of C classes that occur, n_c of class c; one that does not occur has 1.

    Args:
        wanted: by name, or ``balanced``.
        names: of the classes.
        labels: ids of the training rows, int (N,).

    Raises:
        ConfigError: a name is none of the classes.
    """
    counts = np.bincount(np.asarray(labels), minlength=len(names)).astype(np.float64)
    return tuple(_normal(_given(wanted, names, counts), counts).tolist())


def label_weights(wanted: ClassWeights, names: Sequence[str], labels: ArrayLike) -> tuple[tuple[float, float], ...]:
    """For each label the weights of the rows without and with it, whose mean over the training rows is 1.

    ``balanced`` takes each label for two classes of its own; a number is the weight of the rows with the label beside 1
    of those without.

    Args:
        wanted: by name, or ``balanced``.
        names: of the labels.
        labels: of the training rows, 0 or 1, (N, L).

    Raises:
        ConfigError: a name is none of the labels.
    """
    rows = np.asarray(labels)
    found = []
    for place, name in enumerate(names):
        counts = np.bincount(rows[:, place], minlength=2).astype(np.float64)
        given = wanted if wanted == "balanced" else {"with": wanted.get(name, 1.0)}
        low, high = _normal(_given(given, ("without", "with"), counts), counts)
        found.append((float(low), float(high)))
    if wanted != "balanced":
        _check_names(wanted, names)
    return tuple(found)


def _given(wanted: ClassWeights, names: Sequence[str], counts: FloatArray) -> FloatArray:
    if wanted == "balanced":
        present = counts > 0
        return np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1.0)), 1.0)
    _check_names(wanted, names)
    return np.array([wanted.get(name, 1.0) for name in names])


def _normal(weights: FloatArray, counts: FloatArray) -> FloatArray:
    return weights * (counts.sum() / (weights * counts).sum())


def _check_names(wanted: Mapping[str, float], names: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            near = nearest(name, names)
            hint = f"Did you mean {near}?" if near else f"The labels are {', '.join(names[:20])}."
            raise ConfigError(f"data.class_weights has {brief(name)}, which is no label", hint)
