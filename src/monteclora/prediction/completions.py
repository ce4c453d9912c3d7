"""The likelihood of completions, token by token, and how uncertain the model is at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from monteclora.adapters.model import posterior_sampling
from monteclora.data.encoding import IGNORED
from monteclora.prediction.forward import Collate, FloatArray, batches, logits_at, to_device
from monteclora.prediction.predictive import evaluating
from monteclora.system.progress import Progress

__all__ = ["CompletionPredictions", "CompletionScores", "predict_completions"]


@dataclass(frozen=True)
class CompletionScores:
    """How likely each of B completions is.

    Attributes:
        nll: shape (B,), summed over a completion's tokens, nats.
        tokens: shape (B,), how many tokens were scored.
        correct: shape (B,), how many of them were the most likely one.
    """

    nll: FloatArray
    tokens: NDArray[np.int64]
    correct: NDArray[np.int64]

    @property
    def mean_nll(self) -> float:
        """Nats a token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def token_accuracy(self) -> float:
        """The share of tokens that were the most likely one."""
        return float(self.correct.sum() / self.tokens.sum())


@dataclass(frozen=True)
class CompletionPredictions:
    """The likelihood of B completions, token by token given the tokens before.

    Attributes:
        point: under the posterior's mean.
        predictive: under the mean over posterior draws of each next-token distribution; None without draws.
        total, aleatoric, epistemic: shape (B,), mean over a completion's tokens, nats; without draws the epistemic
            part is zero.
        num_samples: posterior draws, 0 for none.
    """

    point: CompletionScores
    predictive: CompletionScores | None
    total: FloatArray
    aleatoric: FloatArray
    epistemic: FloatArray
    num_samples: int


def predict_completions(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Collate,
    *,
    batch_size: int = 16,
    num_samples: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> CompletionPredictions:
    """The likelihood of each row's learned tokens, and how uncertain the model is at each of them.

    Args:
        model: with a language-modelling head.
        rows: encoded, with ``labels`` of -100 on what is not scored.
        collate: pads a list of rows to a batch, labels with -100.
        batch_size: rows a forward pass.
        num_samples: posterior draws; 0 for the mean alone.
        seed: their stream.
        progress: told how many rows are done, batch by batch.
    """
    columns: dict[str, FloatArray] = {}
    with evaluating(model):
        for indices in batches(rows, batch_size):
            batch = to_device(collate([rows[i] for i in indices]), model)
            found = _score_completions(model, batch, num_samples, seed)
            for name, values in found.items():
                columns.setdefault(name, np.zeros(len(rows)))[indices] = values.cpu().numpy()
            if progress is not None:
                progress(len(indices))
    tokens = columns["tokens"].astype(np.int64)
    names = ("point", "predictive") if num_samples else ("point",)
    scores = {
        name: CompletionScores(columns[f"{name} nll"], tokens, columns[f"{name} correct"].astype(np.int64))
        for name in names
    }
    aleatoric = np.minimum(columns["aleatoric"], columns["total"])  # above it by rounding alone
    return CompletionPredictions(
        point=scores["point"],
        predictive=scores.get("predictive"),
        total=columns["total"],
        aleatoric=aleatoric,
        epistemic=columns["total"] - aleatoric,
        num_samples=num_samples,
    )


def _score_completions(model: nn.Module, batch: dict[str, Any], num_samples: int, seed: int) -> dict[str, Tensor]:
    """Sums (means for the uncertainties) over the learned tokens of each row, (b,) float64 each."""
    labels = batch.pop("labels")[:, 1:]
    kept = labels != IGNORED
    columns = kept.any(0).nonzero().squeeze(-1)
    kept, targets = kept[:, columns], labels[:, columns][kept[:, columns]]
    rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(kept)[kept]

    def by_row(values: Tensor) -> Tensor:
        sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        return sums.index_add_(0, rows, values.double())

    def next_token_log_probs() -> Tensor:
        """(K, V) for the K learned tokens of the batch."""
        return logits_at(model, batch, columns)[kept].float().log_softmax(-1)

    def scores(name: str, log_probs: Tensor) -> dict[str, Tensor]:
        nll = -log_probs.gather(-1, targets[:, None]).squeeze(-1)
        right = log_probs.argmax(-1) == targets
        return {f"{name} nll": by_row(nll), f"{name} correct": by_row(right)}

    tokens = by_row(torch.ones_like(targets))
    log_probs = next_token_log_probs()
    found = {"tokens": tokens, **scores("point", log_probs)}
    total = aleatoric = _entropies(log_probs)
    if num_samples:
        mean, aleatoric = torch.zeros_like(log_probs), torch.zeros_like(total)
        for number in range(num_samples):
            with posterior_sampling(model, seed, first=number, resample=False):
                log_probs = next_token_log_probs()
            mean += log_probs.exp() / num_samples
            aleatoric += _entropies(log_probs) / num_samples
        log_probs = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        total = _entropies(log_probs)
        found |= scores("predictive", log_probs)
    return {**found, "total": by_row(total) / tokens, "aleatoric": by_row(aleatoric) / tokens}


def _entropies(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1, dtype=torch.float64)
