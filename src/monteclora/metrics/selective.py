"""Answering some examples and abstaining from the others: what is gained, and what can be promised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from monteclora.errors import ConfigError, DataError
from monteclora.metrics.checks import FloatArray, floats

__all__ = [
    "Abstention",
    "RiskCoverage",
    "abstention_threshold",
    "check_promise",
    "least_examples",
    "risk_coverage",
    "upper_bound",
]

COVERAGES = tuple(step / 10 for step in range(1, 11))
"""The shares of the examples at which :func:`abstention_threshold` looks."""


@dataclass(frozen=True)
class RiskCoverage:
    """The risk of answering the most confident examples alone.

    Attributes:
        coverage: float64 (B,), k / B for k = 1 to B.
        risk: float64 (B,), the share of errors among the k most confident examples; among examples of the same
            confidence the mean over all orders.
    """

    coverage: FloatArray
    risk: FloatArray

    @property
    def aurc(self) -> float:
        """Area under the curve, in [0, 1]: the mean risk over coverages (Geifman, Uziel & El-Yaniv 2019)."""
        return float(self.risk.mean())

    @property
    def optimum(self) -> float:
        """The area of the same number of errors, had every error less confidence than every correct answer."""
        count = len(self.risk)
        answered = np.arange(1, count + 1)
        right = count - round(float(self.risk[-1]) * count)
        return float((np.maximum(answered - right, 0) / answered).mean())

    @property
    def excess(self) -> float:
        """``aurc - optimum``: what a better ranking could gain at the same accuracy; 0 for a perfect one."""
        return self.aurc - self.optimum

    def accuracy_at(self, coverage: float) -> float:
        """Accuracy among the most confident examples, at least this share of all.

        Raises:
            ConfigError: ``coverage`` is not above 0 and at most 1.
        """
        _in_unit("coverage", coverage, closed=True)
        return 1.0 - float(self.risk[max(int(np.ceil(coverage * len(self.risk) - 1e-9)), 1) - 1])


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> RiskCoverage:
    """The risk-coverage curve.

    Args:
        confidence: float (B,), B >= 1, larger where the answer is trusted more; any scale.
        correct: (B,) of 0 and 1, or booleans.

    Raises:
        DataError: an argument is malformed.
    """
    score, right = _pairs(confidence, correct)
    order = np.argsort(-score, kind="stable")
    _, group, sizes = np.unique(-score[order], return_inverse=True, return_counts=True)
    wrong = np.bincount(group, weights=1.0 - right[order]) / sizes
    answered = np.arange(1, len(score) + 1)
    return RiskCoverage(answered / len(score), np.clip(np.cumsum(wrong[group]) / answered, 0.0, 1.0))


@dataclass(frozen=True)
class Abstention:
    """From which confidence on answers keep a promise.

    Attributes:
        threshold: an example is answered where its confidence is above it; ``inf`` where nothing can be promised, and
            ``-inf`` where every example may be answered.
        risk: the promised share of errors among answered examples, at most.
        level: the probability, over the drawing of the examples it was chosen on, that the promise holds.
        examples: how many these were.
        answered: how many of them are answered.
        errors: how many of these answers were wrong.
        bound: the upper confidence bound of the risk that ``answered`` and ``errors`` give; NaN if none is answered.
    """

    threshold: float
    risk: float
    level: float
    examples: int
    answered: int
    errors: int
    bound: float

    @property
    def coverage(self) -> float:
        """The share of the examples that are answered."""
        return self.answered / self.examples

    def abstains(self, confidence: ArrayLike) -> np.ndarray:
        """Whether each example, (B,), is left unanswered."""
        return ~(np.asarray(confidence, dtype=np.float64) > self.threshold)


def abstention_threshold(
    confidence: ArrayLike, correct: ArrayLike, risk: float = 0.1, level: float = 0.9
) -> Abstention:
    """The lowest threshold for which the risk of what is answered is at most ``risk``, with probability ``level``.

    The guarantee holds for finite samples and any distribution and score, provided that the examples here and those
    answered later are drawn independently from one distribution: Clopper-Pearson bounds with Bonferroni's correction
    over ten coverages (the scheme of Geifman & El-Yaniv, NeurIPS 2017). For the j-th of ten shares of the examples the
    threshold is the order statistic of the confidences that leaves this share above it. Given that order statistic, the
    examples above it are independent draws from the distribution of examples above it, so that the number of errors
    among them is binomial, and its Clopper-Pearson upper bound at level ``1 - (1 - level) / 10`` fails with probability
    ``(1 - level) / 10`` at most; all ten hold with probability ``level``. The lowest threshold whose bound is at most
    ``risk`` is taken.

    Args:
        confidence: float (B,), larger where the answer is trusted more; any scale. Not those of training examples.
        correct: (B,) of 0 and 1, or booleans.
        risk: the largest acceptable share of errors, strictly between 0 and 1.
        level: strictly between 0 and 1.

    Raises:
        DataError: an array is malformed.
        ConfigError: ``risk`` or ``level`` is out of range.
    """
    check_promise(risk, level)
    score, right = _pairs(confidence, correct)
    found = Abstention(np.inf, risk, level, len(score), 0, 0, np.nan)
    falling = np.sort(score)[::-1]
    for coverage in COVERAGES:
        place = int(np.floor(coverage * len(score) + 1e-9))
        threshold = float(falling[place]) if place < len(score) else -np.inf
        above = score > threshold
        answered, errors = int(above.sum()), int((1.0 - right[above]).sum())
        bound = upper_bound(errors, answered, _level_of_each(level)) if answered else 1.0
        if bound <= risk:
            found = Abstention(threshold, risk, level, len(score), answered, errors, bound)
    return found


def check_promise(risk: float, level: float) -> None:
    """Raises ConfigError where one of them is not strictly between 0 and 1."""
    _in_unit("risk", risk)
    _in_unit("level", level)


def least_examples(risk: float, level: float) -> int:
    """How many examples it takes that :func:`abstention_threshold` answers any, if every answer is right."""
    # without an error the bound of n answers is 1 - (1 - level of each)^(1/n)
    count = int(np.ceil(np.log1p(-_level_of_each(level)) / np.log1p(-risk) - 1e-9))
    return max(count, 1)


def _level_of_each(level: float) -> float:
    """Bonferroni: of the bound at each coverage, so that all hold at ``level``."""
    return 1 - (1 - level) / len(COVERAGES)


def upper_bound(errors: int, trials: int, level: float) -> float:
    """The one-sided Clopper-Pearson (1934) upper bound of a probability, from ``errors`` of ``trials``."""
    return 1.0 if errors >= trials else float(stats.beta.ppf(level, errors + 1, trials - errors))


def _pairs(confidence: ArrayLike, correct: ArrayLike) -> tuple[FloatArray, FloatArray]:
    score, right = floats("confidence", confidence), floats("correct", correct)
    if score.ndim != 1 or len(score) == 0 or right.shape != score.shape:
        raise DataError(
            f"confidence and correct have shapes {score.shape} and {right.shape}; expected (B,) both, with B >= 1",
            "Pass one value of each for every example.",
        )
    if not np.isin(right, (0.0, 1.0)).all():
        raise DataError("correct has other values than 0 and 1", "Pass whether each answer is right.")
    return score, right


def _in_unit(name: str, value: float, closed: bool = False) -> None:
    if not (0.0 < value < 1.0 or (closed and value == 1.0)):
        raise ConfigError(f"{name} is {value}; expected a value between 0 and 1", "Use 0.1 for 10 %.")
