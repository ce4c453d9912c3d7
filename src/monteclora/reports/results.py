"""What a page knows of a run: plain data, whatever trained it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from monteclora.metrics.calibration import ReliabilityCurve, reliability_curve
from monteclora.metrics.classification import nll_per_example
from monteclora.metrics.multi_label import decisions
from monteclora.metrics.registry import measure
from monteclora.metrics.regression import gaussian_nll_per_example
from monteclora.reports.figures import TrainingCurve

__all__ = ["FINISHED", "Evaluation", "Example", "RunReport", "Uncertainty"]

FINISHED = "finished"


@dataclass(frozen=True)
class Evaluation:
    """How well one run predicts its test examples.

    Attributes:
        metrics: by name, see :mod:`monteclora.metrics.registry`.
        reliability: confidence against accuracy, of several labels that of the decisions; None for scores.
        nll: negative log-likelihood of each example, float (B,), in nats and in the order of the test set.
    """

    metrics: Mapping[str, float]
    reliability: ReliabilityCurve | None
    nll: NDArray[np.float64]

    @classmethod
    def of(cls, probs: ArrayLike, labels: ArrayLike) -> Evaluation:
        """Evaluate ``probs``, float (B, C), against ``labels``, int (B,).

        Raises:
            DataError: either is malformed.
        """
        return cls(
            metrics=measure("classes", probs, labels),
            reliability=reliability_curve(probs, labels),
            nll=nll_per_example(probs, labels),
        )

    @classmethod
    def of_scores(cls, mean: ArrayLike, variance: ArrayLike, scores: ArrayLike) -> Evaluation:
        """Evaluate normal distributions of scores, float (B,) each. Raises DataError where one is malformed."""
        arguments = (mean, variance, scores)
        return cls(measure("scores", *arguments), None, gaussian_nll_per_example(*arguments))

    @classmethod
    def of_labels(cls, probs: ArrayLike, labels: ArrayLike) -> Evaluation:
        """Evaluate the probabilities of several labels, float (B, L), against 0 and 1, (B, L); DataError likewise."""
        examples = decisions(probs, labels)
        nll = nll_per_example(*examples).reshape(np.shape(probs)).mean(1)
        return cls(measure("labels", probs, labels), reliability_curve(*examples), nll)


@dataclass(frozen=True)
class Uncertainty:
    """Predictive uncertainty of a group of examples, float (B,) each, from 0 up, in the unit of the run."""

    total: ArrayLike
    epistemic: ArrayLike


@dataclass(frozen=True)
class Example:
    """A row, and what the model made of it.

    Attributes:
        text: as the model saw it.
        label: the right answer, or empty where there is none.
        prediction: the most probable class.
        confidence: its probability; None where it is no single class.
        total: total uncertainty.
        epistemic: the part of it that is doubt about the weights.
    """

    text: str
    label: str
    prediction: str
    confidence: float | None
    total: float
    epistemic: float


@dataclass(frozen=True)
class RunReport:
    """What a page tells of one run; what is None or empty is left out of it.

    Attributes:
        name: how the page calls the run, unique on the page.
        method: how the page calls the method it trained; runs of one method are repetitions of each other.
        status: ``FINISHED``, or what the run did instead, for instance "interrupted at step 120 of 400".
        evaluation: its test results.
        training: what it logged.
        uncertainty: of each group of examples, by the group's name.
        uncertain_examples: the most uncertain ones, most uncertain first.
        worst_errors: those with a wrong answer, the surest first.
        seconds: wall time of training.
        peak_bytes: peak memory of training.
        trained_parameters: how many parameters training changed.
        unit: of its uncertainties.
        notes: what else its numbers have to be read with, a sentence each: that it went on with a changed recipe, say.
    """

    name: str
    method: str
    status: str
    evaluation: Evaluation | None = None
    training: TrainingCurve | None = None
    uncertainty: Mapping[str, Uncertainty] = field(default_factory=dict)
    uncertain_examples: Sequence[Example] = ()
    worst_errors: Sequence[Example] = ()
    seconds: float | None = None
    peak_bytes: float | None = None
    trained_parameters: int | None = None
    notes: Sequence[str] = ()
    unit: str = "nats"

    @property
    def finished(self) -> bool:
        """Whether the run ended as planned, so that its numbers mean what they say."""
        return self.status == FINISHED

    @property
    def title(self) -> str:
        """The name; if the run did not finish, after a warning, which a narrow legend then won't cut off."""
        return self.name if self.finished else f"unfinished: {self.name}"
