"""What validation measures while a run trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from transformers import EvalPrediction

from monteclora.data.encoding import IGNORED
from monteclora.errors import ConfigError
from monteclora.metrics.registry import Scoring, TokenSums, measure, metrics_for

__all__ = ["Measures", "measures_for"]


class Measures:
    """How a Trainer evaluates: what it keeps of the logits, what it makes of what is kept, and how that is called.

    Attributes:
        names: of the metrics.
        reduce: ``preprocess_logits_for_metrics`` of the Trainer, or None.
        compute: ``compute_metrics`` of the Trainer.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        compute: Callable[[EvalPrediction], dict[str, float]],
        reduce: Callable[[Any, Tensor], Tensor] | None = None,
    ) -> None:
        self.names = names
        self.compute = compute
        self.reduce = reduce

    def check(self, best_metric: str | None) -> None:
        """Raise ConfigError when the recipe wants to be best in something that is not measured."""
        if best_metric is not None and best_metric not in self.names:
            raise ConfigError(
                f"training.best_metric is {best_metric}, and this task has {', '.join(self.names)}", "Choose one."
            )


def measures_for(kind: Literal["classification", "causal_lm"]) -> Measures:
    """Those of a kind of task.

    Classification has the metrics of classes. Causal LM has ``nll``, the mean negative log-likelihood
    of the tokens to be learned (nats), ``perplexity``, its exponential, and ``token_accuracy``, the share of them that
    are the most probable token.
    """
    if kind == "classification":
        return Measures(_names("classes"), _classification)
    return Measures(_names("tokens"), _causal_lm, _token_sums)


def _classification(prediction: EvalPrediction) -> dict[str, float]:
    logits = cast(np.ndarray, prediction.predictions)
    probs = softmax(logits.astype(np.float64), axis=-1)
    return measure("classes", probs, cast(np.ndarray, prediction.label_ids))


def _token_sums(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Of each row: summed NLL, number of learned tokens, and of those predicted right; (B, 3), float64.

    Kept in place of the logits, which for a whole validation set would not fit into memory.
    """
    scores = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1]
    targets = labels[:, 1:]
    learned = targets != IGNORED
    chosen, wanted = scores[learned].float(), targets[learned]
    nll = torch.nn.functional.cross_entropy(chosen, wanted, reduction="none")
    right = chosen.argmax(-1) == wanted
    rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(learned)[learned]
    sums = torch.zeros(len(labels), 3, dtype=torch.float64, device=labels.device)
    return sums.index_add_(0, rows, torch.stack([nll, torch.ones_like(nll), right.to(nll.dtype)], -1).double())


def _causal_lm(prediction: EvalPrediction) -> dict[str, float]:
    nll, tokens, right = cast(np.ndarray, prediction.predictions).sum(0)
    return measure("tokens", TokenSums(float(nll), int(tokens), int(right)))


def _names(scoring: Scoring) -> tuple[str, ...]:
    return tuple(metric.name for metric in metrics_for(scoring))
