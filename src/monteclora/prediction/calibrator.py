"""What is fitted to predictions of validation rows, after training, to make confidence match accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

from monteclora.prediction.predictions import Predictions

__all__ = ["Calibrator"]


class Calibrator(Protocol):
    """A correction of predictions, fitted to validation rows."""

    @property
    def name(self) -> str:
        """As the command line and result files write it."""
        ...

    @classmethod
    def fit(cls, predictions: Predictions) -> Self:
        """Fit to predictions with labels. Raises DataError where they have none."""
        ...

    @property
    def state(self) -> Mapping[str, float]:
        """The numbers that were fitted, to be stored beside the run; ``type(self)(**state)`` is this calibrator."""
        ...

    def apply(self, predictions: Predictions) -> Predictions:
        """The corrected predictions, same shape and labels."""
        ...
