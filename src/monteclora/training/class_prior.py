"""The prediction that gives every row the frequencies of the classes: what a classifier that learned nothing is worth.

A batch with more of a rare class has a higher loss. By how much is known from its labels alone, and is most of what the
losses of small batches differ by while a model is no better than that. The loss of a batch of B rows with the labels
y_b, less its excess 1/B sum_b (l(y_b) - E l), where l(k) is the loss of a row of class k under the frequencies, has the
same mean and less noise: a control variate with the coefficient 1 (Owen 2013, Monte Carlo theory, methods and examples,
section 8.9).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monteclora.data.encoding import IGNORED
from monteclora.runs.prepare import PreparedData
from monteclora.tasks.measures import ClassMeasures

__all__ = ["ClassPrior", "class_prior", "prior_of"]


@dataclass(frozen=True)
class ClassPrior:
    """The loss of the frequencies of the classes, which is the lowest of any prediction that is the same for every row.

    Attributes:
        losses: of a row of each class, nats, weighted as the loss is; shape (K,).
        mean: of them over the training rows.
    """

    losses: Tensor
    mean: float

    def excess(self, labels: Tensor) -> float:
        """The sum over a batch of its rows' losses less the mean; ``labels`` of shape (B,) may be ignored ones."""
        kept = labels[labels != IGNORED].long().cpu()
        return float((self.losses[kept] - self.mean).sum())


def class_prior(labels: Sequence[int], weights: Sequence[float] | None = None) -> ClassPrior:
    """Of the labels of the training rows.

    Args:
        labels: of the rows.
        weights: of the classes in the loss, see :class:`~monteclora.tasks.measures.ClassMeasures`; None for equal ones.
    """
    counts = Counter(labels)
    of_class = [1.0 if weights is None else weights[label] for label in range(max(counts) + 1)]
    weighed = [counts[label] * weight for label, weight in enumerate(of_class)]
    total = sum(weighed)  # the best probabilities are proportional to these
    losses = [-w * math.log(part / total) if part else math.inf for w, part in zip(of_class, weighed, strict=True)]
    mean = sum(counts[label] * losses[label] for label in counts) / len(labels)
    return ClassPrior(torch.tensor(losses, dtype=torch.float64), mean)


def prior_of(data: PreparedData) -> ClassPrior | None:
    """Of prepared data; None where the task is no classification."""
    if not isinstance(data.measures, ClassMeasures):
        return None
    return class_prior(data.train["labels"], data.measures.weights)
