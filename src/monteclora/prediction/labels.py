"""Probabilities of several labels of a row, each of which it has or has not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from monteclora.prediction.predictions import FloatArray, Predictions

__all__ = ["LabelPredictions", "decision_log_probs"]


def decision_log_probs(outputs: Tensor) -> Tensor:
    """Log-probabilities of not having and of having each label, shape (B, 2 L), of a head's outputs, shape (B, L)."""
    both = torch.nn.functional.logsigmoid(torch.stack([-outputs, outputs], -1))
    return both.flatten(1)


@dataclass(frozen=True)
class LabelPredictions:
    """S predictive distributions of each of L labels of B rows.

    Attributes:
        decisions: every label of every row as an example of its own of two classes, without and with the label:
            B * L examples, the labels of a row together. Whatever is defined for classes holds for them.
        num_labels: L.
    """

    decisions: Predictions
    num_labels: int

    @classmethod
    def of(cls, log_probs: FloatArray, num_labels: int) -> Self:
        """From what :func:`decision_log_probs` gives of all rows under all draws, (S, B, 2 L)."""
        return cls(Predictions(log_probs.reshape(len(log_probs), -1, 2)), num_labels)

    def labelled(self, labels: NDArray[np.int64]) -> Self:
        """With the right labels, (B, L) of 0 and 1."""
        return replace(self, decisions=replace(self.decisions, labels=labels.reshape(-1)))

    @property
    def num_samples(self) -> int:
        """S."""
        return self.decisions.num_samples

    @property
    def probs(self) -> FloatArray:
        """The probability of each label, the mean over draws, shape (B, L)."""
        return self._rows(self.decisions.probs[:, 1])

    def of_labels(self, name: str) -> FloatArray:
        """An uncertainty, ``total``, ``aleatoric`` or ``epistemic``, of each label of each row, shape (B, L), nats."""
        return self._rows(getattr(self.decisions, name))

    @property
    def total(self) -> FloatArray:
        """Summed over the labels of a row, shape (B,), nats."""
        return self.of_labels("total").sum(1)

    @property
    def aleatoric(self) -> FloatArray:
        """Likewise."""
        return self.of_labels("aleatoric").sum(1)

    @property
    def epistemic(self) -> FloatArray:
        """Likewise."""
        return self.of_labels("epistemic").sum(1)

    def _rows(self, values: FloatArray) -> FloatArray:
        return values.reshape(-1, self.num_labels)
