"""Predictions: the one currency between samplers, calibrators, metrics, tables and pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from monteclora.prediction import uncertainty

__all__ = ["Predictions"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """S predictive distributions of each of B rows over at most C classes or options.

    Attributes:
        log_probs: log-probabilities, float64, shape (S, B, C), one distribution per draw; minus infinity after the
            options of a row that has fewer than C.
        labels: the right class or option of each row, int64, shape (B,); None where it is unknown.
    """

    log_probs: FloatArray
    labels: NDArray[np.int64] | None = None

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.log_probs)

    @cached_property
    def probs(self) -> FloatArray:
        """The predictive distribution, mean_s p_s, float64, shape (B, C)."""
        mean: FloatArray = np.exp(self.log_probs).mean(0)
        return mean

    @cached_property
    def total(self) -> FloatArray:
        """H[mean_s p_s], shape (B,), nats."""
        return uncertainty.total(self._draws).numpy()

    @cached_property
    def aleatoric(self) -> FloatArray:
        """mean_s H[p_s], shape (B,), nats."""
        return uncertainty.aleatoric(self._draws).numpy()

    @cached_property
    def epistemic(self) -> FloatArray:
        """The mutual information between label and draw, shape (B,), nats, never negative, 0 for S = 1."""
        return uncertainty.epistemic(self._draws).numpy()

    @property
    def _draws(self) -> torch.Tensor:
        return torch.from_numpy(self.log_probs).exp()
