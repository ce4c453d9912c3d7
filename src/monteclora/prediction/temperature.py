"""Temperature scaling (Guo et al. 2017, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from scipy.special import log_softmax

from monteclora.errors import DataError
from monteclora.metrics.calibration import best_temperature, smoothed_nll
from monteclora.metrics.classification import SMALLEST_PROBABILITY
from monteclora.prediction.predictions import Predictions

__all__ = ["Temperature"]


@dataclass(frozen=True)
class Temperature:
    """Divides the logits of every draw by T; above 1 it takes confidence away, and it never changes an order.

    Attributes:
        temperature: T, positive.
    """

    temperature: float
    name: str = "temperature"

    @classmethod
    def fit(cls, predictions: Predictions) -> Self:
        """The T with the smallest NLL of the mean predictive distribution, smoothed: rows that are all answered right
        would make it 0.

        Raises:
            DataError: the predictions have no labels.
        """
        labels = predictions.labels
        if labels is None:
            raise DataError("a temperature is fitted to labels, and these rows have none", "Give a labelled file.")

        def objective(temperature: float) -> float:
            probs = cls(temperature).apply(predictions).probs
            return smoothed_nll(np.log(np.clip(probs, SMALLEST_PROBABILITY, 1.0)), labels)

        return cls(best_temperature(objective))

    @property
    def state(self) -> Mapping[str, float]:
        """``temperature``."""
        return {"temperature": self.temperature}

    def apply(self, predictions: Predictions) -> Predictions:
        """``log_softmax(log p_s / T)``, draw by draw."""
        scaled = log_softmax(predictions.log_probs / self.temperature, axis=-1)
        return replace(predictions, log_probs=scaled)
