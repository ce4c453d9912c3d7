"""Class probabilities of many rows, batch by batch and draw by draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monteclora.prediction.forward import Collate, FloatArray, batches, to_device
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.predictive import class_logits, drawn_logits, evaluating
from monteclora.prediction.sampler import MEAN, Sampler, sharing
from monteclora.system.progress import Progress

__all__ = ["collect", "predict_classes", "predict_outputs"]


def collect(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    score: Callable[[list[int]], Tensor],
    sampler: Sampler,
    *,
    batch_size: int,
    progress: Progress | None = None,
    draws: Callable[[list[int]], Tensor] | None = None,
) -> FloatArray:
    """Score every row under every draw: float64, shape (S, B, C).

    Args:
        model: in evaluation mode during the call.
        rows: with ``input_ids``, whose lengths decide the batches.
        score: from B row numbers to scores, float64, shape (B, C).
        sampler: what is drawn.
        batch_size: rows per batch.
        progress: called with the number of rows done, batch by batch.
        draws: from B row numbers to scores under every draw, (S, B, C), for a sampler that makes them together.
    """
    found: FloatArray | None = None
    with evaluating(model):
        for indices in batches(rows, batch_size):
            values = (draws(indices) if draws else _one_by_one(model, indices, score, sampler)).cpu().numpy()
            if found is None:
                found = np.empty((values.shape[0], len(rows), values.shape[2]))
            found[:, indices] = values
            if progress is not None:
                progress(len(indices))
    return np.empty((sampler.num_samples, 0, 0)) if found is None else found


def _one_by_one(model: nn.Module, indices: list[int], score: Callable[[list[int]], Tensor], sampler: Sampler) -> Tensor:
    found = []
    for number in range(sampler.num_samples):
        with sampler.draw(model, number):
            found.append(score(indices).cpu())
    return torch.stack(found)


def predict_classes(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Collate,
    *,
    sampler: Sampler = MEAN,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Predictions:
    """Class probabilities of encoded rows; for a language model those of the next token.

    Args:
        model: with a classification or language-modelling head.
        rows: with ``input_ids`` and what else the tokenizer gives; ``labels`` are ignored.
        collate: pads a list of rows to a batch.
        sampler: what is drawn.
        batch_size: rows per forward pass.
        progress: called with the number of rows done, batch by batch.
    """
    arguments: dict[str, Any] = {"sampler": sampler, "batch_size": batch_size, "progress": progress}
    return Predictions(predict_outputs(model, rows, collate, lambda logits: logits.log_softmax(-1), **arguments))


def predict_outputs(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Collate,
    of: Callable[[Tensor], Tensor],
    *,
    sampler: Sampler = MEAN,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> FloatArray:
    """A function of the outputs of a model's head for every row under every draw: float64, shape (S, B, ...).

    Args:
        model, rows, collate, sampler, batch_size, progress: see :func:`predict_classes`.
        of: takes the outputs of a batch, float64, shape (B, C); gives shape (B, K).
    """
    inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]

    def batch_of(indices: list[int]) -> dict[str, Any]:
        return to_device(collate([inputs[i] for i in indices]), model)

    def score(indices: list[int]) -> Tensor:
        return of(class_logits(model, batch_of(indices)).double())

    def together(indices: list[int]) -> Tensor:
        assert shared is not None
        found = [of(logits) for logits in drawn_logits(model, batch_of(indices), shared).double()]
        return torch.stack(found)

    shared = sharing(sampler)
    draws = None if shared is None else together
    return collect(model, inputs, score, sampler, batch_size=batch_size, progress=progress, draws=draws)
