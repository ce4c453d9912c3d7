"""Every metric by name: what it is a function of, which direction is better, and what reports call it.

A new metric is a function in this room and a line here; recipes, validation, evaluation, reports and the command line
read it from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from monteclora.metrics.calibration import DEFAULT_BINS, expected_calibration_error, tempered_nll
from monteclora.metrics.classification import accuracy, brier, f1, matthews, nll
from monteclora.metrics.multi_label import f1_macro, f1_micro, label_brier, label_ece, label_nll, subset_accuracy
from monteclora.metrics.regression import INTERVAL, coverage, gaussian_nll, mae, r2, rmse, spearman

__all__ = ["METRICS", "Metric", "Scoring", "TokenSums", "measure", "metrics_for"]

Scoring = Literal["classes", "options", "options_per_byte", "tokens", "scores", "labels"]
"""What is scored: classes; answer options, whose order carries no meaning; options by their log-likelihood per byte;
the tokens of completions; predicted scores; or labels of which a row may have several."""


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
        greater_is_better: which direction is better; None where neither is, and nothing can be chosen by the metric.
        functions: for each scoring that the metric applies to, the function of it: of ``probs`` (B, C) and ``labels``
            (B,) for classes and options, of :class:`TokenSums` for tokens, of ``mean``, ``variance`` and ``scores``
            (B,) for scores, of ``probs`` and ``labels`` (B, L) for labels.
        chooses: whether it is measured to choose weights by, and for nothing else: something of it is fitted to the
            rows that it is measured on.
    """

    name: str
    label: str
    greater_is_better: bool | None
    functions: Mapping[Scoring, Callable[..., float]]
    chooses: bool = False


def _perplexity(sums: TokenSums) -> float:
    mean = _token_nll(sums)
    return math.exp(mean) if mean < 700 else math.inf


def _token_nll(sums: TokenSums) -> float:
    return sums.nll / sums.tokens


def _token_accuracy(sums: TokenSums) -> float:
    return sums.correct / sums.tokens


def _both(function: Callable[..., float]) -> dict[Scoring, Callable[..., float]]:
    return {"classes": function, "options": function}


_NLL: Mapping[Scoring, Callable[..., float]] = {
    **_both(nll),
    "tokens": _token_nll,
    "scores": gaussian_nll,
    "labels": label_nll,
}
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", True, _both(accuracy)),
        Metric("accuracy_per_byte", "accuracy per byte", True, {"options_per_byte": accuracy}),
        Metric("subset_accuracy", "subset accuracy", True, {"labels": subset_accuracy}),
        Metric("f1", "F1", True, {"classes": f1}),
        Metric("f1_micro", "micro F1", True, {"labels": f1_micro}),
        Metric("f1_macro", "macro F1", True, {"labels": f1_macro}),
        Metric("mcc", "MCC", True, {"classes": matthews}),
        Metric("rmse", "RMSE", False, {"scores": rmse}),
        Metric("mae", "MAE", False, {"scores": mae}),
        Metric("r2", "R²", True, {"scores": r2}),
        Metric("spearman", "Spearman", True, {"scores": spearman}),
        Metric("nll", "NLL (nats)", False, _NLL),
        Metric("tempered_nll", "NLL at the best temperature (nats)", False, {"classes": tempered_nll}, chooses=True),
        Metric("brier", "Brier", False, {**_both(brier), "labels": label_brier}),
        Metric("ece", "ECE", False, {**_both(expected_calibration_error), "labels": label_ece}),
        Metric("coverage_90", f"coverage of the {100 * INTERVAL:.0f} % interval", None, {"scores": coverage}),
        Metric("perplexity", "perplexity", False, {"tokens": _perplexity}),
        Metric("token_accuracy", "token accuracy", True, {"tokens": _token_accuracy}),
    )
}


def metrics_for(scoring: Scoring, *, choosing: bool = False) -> tuple[Metric, ...]:
    """The metrics that apply, in the order in which they are shown; with those that choose weights if asked for."""
    return tuple(
        metric for metric in METRICS.values() if scoring in metric.functions and (choosing or not metric.chooses)
    )


def measure(
    scoring: Scoring, *arguments: Any, bins: int = DEFAULT_BINS, chosen_by: str | None = None
) -> dict[str, float]:
    """All metrics that apply, by name.

    Args:
        scoring: what is scored.
        *arguments: what the functions of the scoring take, see :class:`Metric`.
        bins: of the calibration error.
        chosen_by: the metric that weights are chosen by, which is measured too if it does nothing else.
    """
    measured = [each for each in metrics_for(scoring, choosing=True) if not each.chooses or each.name == chosen_by]
    found = {metric.name: metric.functions[scoring](*arguments) for metric in measured}
    if bins != DEFAULT_BINS and "ece" in found:
        found["ece"] = METRICS["ece"].functions[scoring](*arguments, bins)
    return found
