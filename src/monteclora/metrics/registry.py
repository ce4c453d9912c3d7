"""Every metric by name: what it is a function of, which direction is better, and what reports call it.

A new metric is a function in this room and a line here; recipes, validation, evaluation, reports and the command line
read it from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from monteclora.metrics.calibration import DEFAULT_BINS, expected_calibration_error
from monteclora.metrics.classification import accuracy, brier, f1, matthews, nll

__all__ = ["METRICS", "Metric", "Scoring", "TokenSums", "measure", "metrics_for"]

Scoring = Literal["classes", "options", "options_per_byte", "tokens"]
"""What is scored: classes; answer options, whose order carries no meaning; options by their log-likelihood per byte; or
the tokens of completions."""


@dataclass(frozen=True)
class TokenSums:
    """Sums over the scored tokens of some completions.

    Attributes:
        nll: negative log-likelihood, nats.
        tokens: how many tokens.
        correct: how many of them were the most likely one.
    """

    nll: float
    tokens: int
    correct: int


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: as recipes and files write it.
        label: for tables and figures.
        greater_is_better: which direction is better.
        functions: for each scoring that the metric applies to, the function of it: of ``probs`` (B, C) and ``labels``
            (B,) for classes and options, of :class:`TokenSums` for tokens.
    """

    name: str
    label: str
    greater_is_better: bool
    functions: Mapping[Scoring, Callable[..., float]]


def _perplexity(sums: TokenSums) -> float:
    mean = _token_nll(sums)
    return math.exp(mean) if mean < 700 else math.inf


def _token_nll(sums: TokenSums) -> float:
    return sums.nll / sums.tokens


def _token_accuracy(sums: TokenSums) -> float:
    return sums.correct / sums.tokens


def _both(function: Callable[..., float]) -> dict[Scoring, Callable[..., float]]:
    return {"classes": function, "options": function}


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", True, _both(accuracy)),
        Metric("accuracy_per_byte", "accuracy per byte", True, {"options_per_byte": accuracy}),
        Metric("f1", "F1", True, {"classes": f1}),
        Metric("mcc", "MCC", True, {"classes": matthews}),
        Metric("nll", "NLL (nats)", False, {**_both(nll), "tokens": _token_nll}),
        Metric("brier", "Brier", False, _both(brier)),
        Metric("ece", "ECE", False, _both(expected_calibration_error)),
        Metric("perplexity", "perplexity", False, {"tokens": _perplexity}),
        Metric("token_accuracy", "token accuracy", True, {"tokens": _token_accuracy}),
    )
}


def metrics_for(scoring: Scoring) -> tuple[Metric, ...]:
    """The metrics that apply, in the order in which they are shown."""
    return tuple(metric for metric in METRICS.values() if scoring in metric.functions)


def measure(scoring: Scoring, *arguments: Any, bins: int = DEFAULT_BINS) -> dict[str, float]:
    """All metrics that apply, by name.

    Args:
        scoring: what is scored.
        *arguments: ``probs`` (B, C) and ``labels`` (B,), or :class:`TokenSums`.
        bins: of the calibration error.
    """
    found = {metric.name: metric.functions[scoring](*arguments) for metric in metrics_for(scoring)}
    if bins != DEFAULT_BINS and "ece" in found:
        probs, labels = arguments
        found["ece"] = expected_calibration_error(probs, labels, bins)
    return found
