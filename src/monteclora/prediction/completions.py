"""The likelihood of completions, token by token, and how uncertain the model is at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from monteclora.data.encoding import IGNORED
from monteclora.metrics.registry import TokenSums
from monteclora.prediction.forward import Collate, FloatArray, batches, logits_at, to_device
from monteclora.prediction.predictive import evaluating
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.system.progress import Progress

__all__ = ["CompletionScores", "score_completions"]


@dataclass(frozen=True)
class CompletionScores:
    """How likely each of B completions is under the mean over draws of each next-token distribution.

    Attributes:
        nll: shape (B,), summed over a completion's tokens, nats.
        tokens: shape (B,), how many tokens were scored.
        correct: shape (B,), how many of them were the most likely one.
        total, aleatoric, epistemic: shape (B,), mean over a completion's tokens, nats.
        num_samples: draws.
    """

    nll: FloatArray
    tokens: NDArray[np.int64]
    correct: NDArray[np.int64]
    total: FloatArray
    aleatoric: FloatArray
    epistemic: FloatArray
    num_samples: int

    @property
    def sums(self) -> TokenSums:
        """Over all completions."""
        return TokenSums(float(self.nll.sum()), int(self.tokens.sum()), int(self.correct.sum()))


def score_completions(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Collate,
    *,
    sampler: Sampler = MEAN,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> CompletionScores:
    """The likelihood of each row's learned tokens, and how uncertain the model is at each of them.

    Args:
        model: with a language-modelling head.
        rows: encoded, with ``labels`` of -100 on what is not scored.
        collate: pads a list of rows to a batch, labels with -100.
        sampler: what is drawn.
        batch_size: rows per forward pass.
        progress: called with the number of rows done, batch by batch.
    """
    columns: dict[str, FloatArray] = {}
    with evaluating(model):
        for indices in batches(rows, batch_size):
            batch = to_device(collate([rows[i] for i in indices]), model)
            for name, values in _score(model, batch, sampler).items():
                columns.setdefault(name, np.zeros(len(rows)))[indices] = values.cpu().numpy()
            if progress is not None:
                progress(len(indices))
    aleatoric = np.minimum(columns["aleatoric"], columns["total"])  # above it by rounding alone
    return CompletionScores(
        nll=columns["nll"],
        tokens=columns["tokens"].astype(np.int64),
        correct=columns["correct"].astype(np.int64),
        total=columns["total"],
        aleatoric=aleatoric,
        epistemic=columns["total"] - aleatoric,
        num_samples=sampler.num_samples,
    )


def _score(model: nn.Module, batch: dict[str, Any], sampler: Sampler) -> dict[str, Tensor]:
    """Sums (means for the uncertainties) over the learned tokens of each row, float64, shape (B,) each."""
    labels = batch.pop("labels")[:, 1:]
    kept = labels != IGNORED
    columns = kept.any(0).nonzero().squeeze(-1)
    kept, targets = kept[:, columns], labels[:, columns][kept[:, columns]]
    rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(kept)[kept]

    def by_row(values: Tensor) -> Tensor:
        sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        return sums.index_add_(0, rows, values.double())

    log_probs, aleatoric = _mean_log_probs(model, batch, columns, kept, sampler)
    nll = -log_probs.gather(-1, targets[:, None]).squeeze(-1)
    tokens = by_row(torch.ones_like(targets))
    return {
        "tokens": tokens,
        "nll": by_row(nll),
        "correct": by_row(log_probs.argmax(-1) == targets),
        "total": by_row(_entropies(log_probs)) / tokens,
        "aleatoric": by_row(aleatoric) / tokens,
    }


def _mean_log_probs(
    model: nn.Module, batch: dict[str, Any], columns: Tensor, kept: Tensor, sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """``log mean_s p_s`` of the K scored tokens over the vocabulary, (K, V), and ``mean_s H[p_s]``, (K,).

    A running mean: S distributions over a vocabulary for every token would not fit into memory.
    """

    def drawn(number: int) -> Tensor:
        with sampler.draw(model, number):
            return logits_at(model, batch, columns)[kept].float().log_softmax(-1)

    if sampler.num_samples == 1:
        log_probs = drawn(0)
        return log_probs, _entropies(log_probs)
    mean = aleatoric = torch.zeros(())
    for number in range(sampler.num_samples):
        log_probs = drawn(number)
        mean = mean.to(log_probs.device) + log_probs.exp() / sampler.num_samples
        aleatoric = aleatoric.to(log_probs.device) + _entropies(log_probs) / sampler.num_samples
    return mean.clamp_min(torch.finfo(mean.dtype).tiny).log(), aleatoric


def _entropies(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1, dtype=torch.float64)
