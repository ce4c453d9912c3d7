"""What is learned from a batch and what validation measures, for each kind of task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, softmax
from torch import Tensor, nn

from monteclora.data.encoding import IGNORED
from monteclora.data.scores import ScoreScale
from monteclora.errors import ConfigError
from monteclora.metrics.registry import Scoring, TokenSums, measure, metrics_for
from monteclora.prediction.scores import mean_and_variance

__all__ = ["ClassMeasures", "LabelMeasures", "Measures", "ScoreMeasures", "TokenMeasures", "check_metric"]


class Measures(Protocol):
    """The loss and the validation metrics of a kind of task. B rows in a batch, N in the validation split."""

    @property
    def scoring(self) -> Scoring:
        """What the metrics are of."""
        ...

    def count(self, labels: Tensor) -> Tensor:
        """How many items a batch's loss is a sum over, a scalar."""
        ...

    def loss(self, model: nn.Module, batch: Mapping[str, Any], items: Tensor) -> Tensor:
        """The summed negative log-likelihood of the batch divided by ``items``, those of the whole optimiser step.

        Gradients of accumulated batches therefore add up to that of their union, whatever their sizes.
        """
        ...

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is kept of a validation batch, shape (B, K)."""
        ...

    def compute(self, kept: NDArray[np.float64], labels: NDArray[Any] | None) -> dict[str, float]:
        """The metrics of all that was kept, (N, K), and of labels, (N,) or (N, L), None for token labels."""
        ...


def check_metric(measures: Measures, best_metric: str | None) -> None:
    """Raise ConfigError when the recipe selects by a metric that is not measured."""
    names = [
        metric.name for metric in metrics_for(measures.scoring, choosing=True) if metric.greater_is_better is not None
    ]
    if best_metric is not None and best_metric not in names:
        raise ConfigError(f"training.best_metric is {best_metric}, and this task has {', '.join(names)}", "Choose one.")


@dataclass(frozen=True)
class ClassMeasures:
    """Of a classification head; see :class:`Measures`.

    ``weights`` has one for each class, None for equal ones; metrics are of rows, which all count alike. ``chosen_by``
    is the metric that the run's weights are chosen by, None where they are not.
    """

    weights: tuple[float, ...] | None = None
    chosen_by: str | None = None
    scoring: Scoring = "classes"

    def count(self, labels: Tensor) -> Tensor:
        """The labels that are not ignored."""
        return labels.ne(IGNORED).sum()

    def loss(self, model: nn.Module, batch: Mapping[str, Any], items: Tensor) -> Tensor:
        """Cross-entropy of the labels; the head's own loss would ignore how many items other batches have."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits
        labels = batch["labels"].to(logits.device)
        flat = logits.view(-1, logits.shape[-1]).float()
        weight = None if self.weights is None else _on(flat.device, flat.dtype, self.weights)
        total = nn.functional.cross_entropy(
            flat, labels.view(-1).long(), weight=weight, reduction="sum", ignore_index=IGNORED
        )
        return total / items.to(total.device).clamp(min=1)

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits themselves."""
        return logits

    def compute(self, kept: NDArray[np.float64], labels: NDArray[Any] | None) -> dict[str, float]:
        """The metrics of classes."""
        probs = softmax(kept.astype(np.float64), axis=-1)
        return measure(self.scoring, probs, cast(Any, labels), chosen_by=self.chosen_by)


@dataclass(frozen=True)
class LabelMeasures:
    """Of a head with an output for each of several labels of a row; see :class:`Measures`.

    ``weights`` has for each label those of the rows without and with it, None for equal ones.
    """

    weights: tuple[tuple[float, float], ...] | None = None
    scoring: Scoring = "labels"

    def count(self, labels: Tensor) -> Tensor:
        """The rows whose labels are not ignored."""
        return labels[:, 0].ne(IGNORED).sum()

    def loss(self, model: nn.Module, batch: Mapping[str, Any], items: Tensor) -> Tensor:
        """Binary cross-entropy summed over the labels of a row: its negative log-likelihood."""
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
        labels = batch["labels"].to(logits.device)
        counted = labels[:, :1] != IGNORED
        wanted = labels.where(counted, 0)
        weight = None
        if self.weights is not None:
            both = _on(logits.device, logits.dtype, self.weights)
            weight = torch.where(wanted > 0, both[:, 1], both[:, 0])
        each = nn.functional.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), weight, reduction="none")
        total = each.where(counted, 0).sum()  # to select rows would wait for the device, which alone knows how many
        return total / items.to(total.device).clamp(min=1)

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits themselves."""
        return logits

    def compute(self, kept: NDArray[np.float64], labels: NDArray[Any] | None) -> dict[str, float]:
        """The metrics of several labels."""
        return measure(self.scoring, expit(kept.astype(np.float64)), cast(Any, labels))


@dataclass(frozen=True)
class ScoreMeasures:
    """Of a head that predicts mean and variance of a score; see :class:`Measures`.

    Labels are standardised scores, NaN where ignored; metrics are in the unit of the scores, by ``scale``.
    """

    scale: ScoreScale
    scoring: Scoring = "scores"

    def count(self, labels: Tensor) -> Tensor:
        """The scores that are not ignored."""
        return labels.isnan().logical_not().sum()

    def loss(self, model: nn.Module, batch: Mapping[str, Any], items: Tensor) -> Tensor:
        """The negative log-density of the standardised scores under the predicted normal distributions."""
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
        labels = batch["labels"].to(logits.device)
        counted = ~labels.isnan()
        mean, variance = mean_and_variance(logits)
        wanted = labels.where(counted, 0).to(mean.dtype)
        each = torch.log(2 * torch.pi * variance) + (wanted - mean).square() / variance
        total = 0.5 * each.where(counted, 0).sum()  # as above: nothing waits for the device
        return total / items.to(total.device).clamp(min=1)

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean and variance, (B, 2)."""
        return torch.stack(mean_and_variance(logits.double()), -1)

    def compute(self, kept: NDArray[np.float64], labels: NDArray[Any] | None) -> dict[str, float]:
        """The metrics of scores."""
        scale, scores = self.scale, np.asarray(labels, dtype=np.float64)
        mean, variance = kept[:, 0] * scale.spread + scale.centre, kept[:, 1] * scale.spread**2
        return measure(self.scoring, mean, variance, scores * scale.spread + scale.centre)


@dataclass(frozen=True)
class TokenMeasures:
    """Of a language-modelling head; see :class:`Measures`.

    ``nll`` is the mean negative log-likelihood of the tokens to be learned, in nats; ``perplexity`` its exponential;
    ``token_accuracy`` the share of them that are the most probable token.
    """

    scoring: Scoring = "tokens"

    def count(self, labels: Tensor) -> Tensor:
        """The tokens that are predicted: the first of a row never is."""
        return labels[..., 1:].ne(IGNORED).sum()

    def loss(self, model: nn.Module, batch: Mapping[str, Any], items: Tensor) -> Tensor:
        """The model's own loss where it takes the number of items, so that auxiliary losses of experts are in it."""
        if _takes_loss_arguments(model):
            found: Tensor = model(**batch, num_items_in_batch=items).loss
            return found
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        targets = batch["labels"][:, 1:].to(logits.device)
        flat = logits[:, :-1].float().flatten(0, 1)
        total = nn.functional.cross_entropy(flat, targets.flatten(), reduction="sum", ignore_index=IGNORED)
        return total / items.to(total.device).clamp(min=1)

    def reduce(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of each row: summed NLL, number of learned tokens, and of those predicted right; (B, 3), float64.

        Kept in place of the logits, which for a whole validation set would not fit into memory.
        """
        scores, targets = logits[:, :-1], labels[:, 1:]
        learned = targets != IGNORED
        chosen, wanted = scores[learned].float(), targets[learned]
        nll = nn.functional.cross_entropy(chosen, wanted, reduction="none")
        right = chosen.argmax(-1) == wanted
        rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(learned)[learned]
        sums = torch.zeros(len(labels), 3, dtype=torch.float64, device=labels.device)
        return sums.index_add_(0, rows, torch.stack([nll, torch.ones_like(nll), right.to(nll.dtype)], -1).double())

    def compute(self, kept: NDArray[np.float64], labels: NDArray[Any] | None) -> dict[str, float]:
        """The metrics of tokens."""
        nll, tokens, right = kept.sum(0)
        return measure(self.scoring, TokenSums(float(nll), int(tokens), int(right)))


@cache
def _on(device: torch.device, dtype: torch.dtype, weights: tuple[Any, ...]) -> Tensor:
    """Weights as a tensor, copied to the device once and not for every batch."""
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=dtype, device=device)


def _takes_loss_arguments(model: nn.Module) -> bool:
    """Whether the model's forward hands further arguments on to its loss, as transformers tells."""
    base: Any = model
    while hasattr(base, "module"):  # DDP
        base = base.module
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    return _takes_keywords(type(base).forward)


@cache  # asked of every batch
def _takes_keywords(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
