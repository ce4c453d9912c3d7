"""Features in which no direction is larger than another for being shared by all rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from monteclora.prediction.forward import FloatArray

__all__ = ["Whitening"]


@dataclass(frozen=True)
class Whitening:
    """Takes the reference rows' mean from features, and divides each principal direction by its spread.

    That is ``(x - m) (C + l I)^(-1/2)`` with the reference rows' mean m and covariance C, as sentence embeddings are
    whitened by Su et al. (arXiv 2103.15316), with a ridge l for directions that few rows have.

    Attributes:
        middle: float64 (D,), m.
        directions: float64 (D, R), the principal directions of the reference, R at most its rows.
        scales: float64 (R,), by what each is multiplied beyond ``rest``.
        rest: by what everything is multiplied.
    """

    middle: FloatArray
    directions: FloatArray
    scales: FloatArray
    rest: float

    @classmethod
    def of(cls, reference: ArrayLike, ridge: float = 1.0) -> Whitening:
        """Of reference rows.

        Args:
            reference: float (N, D).
            ridge: l, in units of the mean variance over the D directions.
        """
        rows = np.asarray(reference, dtype=float)
        middle = rows.mean(0)
        centred = rows - middle
        count, width = rows.shape
        least = max(ridge * float((centred**2).sum()) / (count * width), 1e-24)
        if count >= width:
            variances, directions = np.linalg.eigh(centred.T @ centred / count)
        else:  # the same from the smaller matrix: directions are combinations of rows
            variances, mixed = np.linalg.eigh(centred @ centred.T / count)
            directions = centred.T @ (mixed / np.sqrt(np.maximum(count * variances, 1e-24)))
        kept = variances > 1e-12 * variances[-1]
        rest = 1 / np.sqrt(least)
        return cls(middle, directions[:, kept], 1 / np.sqrt(variances[kept] + least) - rest, float(rest))

    def __call__(self, features: ArrayLike) -> FloatArray:
        """Features float (B, D), whitened: float64 (B, D)."""
        centred = np.asarray(features, dtype=float) - self.middle
        found: FloatArray = self.rest * centred + (centred @ self.directions * self.scales) @ self.directions.T
        return found
