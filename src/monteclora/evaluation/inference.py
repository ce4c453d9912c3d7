"""Predictions over a whole split: class probabilities, options by likelihood, the likelihood of completions.

Each is computed under the posterior's mean (a plain LoRA) and, where there is a posterior and draws are asked for,
under draws from it, split into what the data leave open and what the weights do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from monteclora.adapters.model import posterior_sampling
from monteclora.evaluation.predictive import PredictiveDistribution, class_logits, evaluating

__all__ = ["CompletionScores", "SplitPredictions", "completion_scores", "predict_classes", "predict_options"]

FloatArray = NDArray[np.float64]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class SplitPredictions:
    """Predictions for B rows over at most C classes; a row with fewer has zeros behind them.

    Attributes:
        probs: shape (B, C): the mean over posterior draws, or the point prediction where there are none.
        point: shape (B, C), under the posterior's mean.
        total, aleatoric, epistemic: shape (B,), nats; without draws the epistemic part is zero.
        num_samples: posterior draws, 0 for none.
    """

    probs: FloatArray
    point: FloatArray
    total: FloatArray
    aleatoric: FloatArray
    epistemic: FloatArray
    num_samples: int


@dataclass(frozen=True)
class CompletionScores:
    """How likely each of B completions is under the model.

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


def _batches(rows: Sequence[dict[str, Any]], size: int) -> Iterator[list[int]]:
    """Indices in batches of rows of like length, longest first: little padding, and memory runs out early or never."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    for first in range(0, len(order), size):
        yield order[first : first + size]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _to_device(batch: Any, model: nn.Module) -> dict[str, Any]:
    device = _device(model)
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


def _collect(
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    num_samples: int,
    seed: int,
    model: nn.Module,
    score: Callable[[list[int]], Tensor],
    progress: Progress | None,
) -> SplitPredictions:
    """Run ``score`` (indices -> probabilities (b, C), float64) on every batch, at the mean and under each draw."""
    count = len(rows)
    parts: list[tuple[list[int], Tensor, PredictiveDistribution | None]] = []
    with evaluating(model):
        for indices in _batches(rows, batch_size):
            point = score(indices)
            draws = []
            for number in range(num_samples):
                with posterior_sampling(model, seed, first=number, resample=False):
                    draws.append(score(indices))
            parts.append((indices, point, PredictiveDistribution(torch.stack(draws)) if draws else None))
            if progress is not None:
                progress(len(indices))
    width = max(point.shape[1] for _, point, _ in parts)
    arrays: dict[str, FloatArray] = {name: np.zeros((count, width)) for name in ("probs", "point")}
    for name in ("total", "aleatoric", "epistemic"):
        arrays[name] = np.zeros(count)
    for indices, point, drawn in parts:
        found = drawn or PredictiveDistribution(point.unsqueeze(0))
        arrays["point"][indices, : point.shape[1]] = point.cpu().numpy()
        arrays["probs"][indices, : point.shape[1]] = found.probs.double().mean(0).cpu().numpy()
        for name in ("total", "aleatoric", "epistemic"):
            arrays[name][indices] = getattr(found, name).cpu().numpy()
    return SplitPredictions(**arrays, num_samples=num_samples)


def predict_classes(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], Any],
    *,
    batch_size: int = 64,
    num_samples: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> SplitPredictions:
    """Class probabilities of encoded rows.

    Args:
        model: with a classification head.
        rows: with ``input_ids`` and what else the tokenizer gives; ``labels`` are ignored.
        collate: pads a list of rows to a batch.
        batch_size: rows a forward pass.
        num_samples: posterior draws; 0 for the point prediction alone.
        seed: their stream.
        progress: told how many rows are done, batch by batch.
    """
    inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]

    def score(indices: list[int]) -> Tensor:
        batch = _to_device(collate([inputs[i] for i in indices]), model)
        return class_logits(model, batch).double().softmax(-1)

    return _collect(inputs, batch_size, num_samples, seed, model, score, progress)


def predict_options(
    model: nn.Module,
    rows: Sequence[Sequence[dict[str, list[int]]]],
    collate: Callable[[list[dict[str, Any]]], Any],
    *,
    batch_size: int = 16,
    num_samples: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> SplitPredictions:
    """Probabilities of answer options: each completion's likelihood, normalised over a row's options.

    Tokens that all options of a row share before they part add the same to each and need not be scored; tokens that
    they share at the end (the end of the turn) are left out, as likelihood benchmarks do.

    Args:
        model: with a language-modelling head.
        rows: for each row, its options as encoded completions (``input_ids`` and ``labels``).
        collate: pads a list of encoded completions to a batch.
        batch_size: rows a forward pass.
        num_samples: posterior draws; 0 for the point prediction alone.
        seed: their stream.
        progress: told how many rows are done, batch by batch.
    """
    plans = [_option_plan([option["input_ids"] for option in options]) for options in rows]
    width = max(len(options) for options in rows)

    def score(indices: list[int]) -> Tensor:
        sequences = [sequence for i in indices for sequence in plans[i].sequences]
        batch = collate([_unlabelled(ids) for ids in sequences])
        log_probs = _next_log_probs(model, batch, [len(ids) for ids in sequences], plans, indices)
        result = torch.full((len(indices), width), -torch.inf, dtype=torch.float64)
        for row, values in enumerate(log_probs):
            result[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
        return result.softmax(-1)

    shown = [{"input_ids": plan.sequences[0]} for plan in plans]
    return _collect(shown, batch_size, num_samples, seed, model, score, progress)


@dataclass(frozen=True)
class _OptionPlan:
    """How to score a row's options: which sequences to run, and in each the (position, token) pairs to add up.

    Where the options part in a single token one sequence serves them all: ``targets`` then has a list of one pair for
    each option, all in sequence 0.
    """

    sequences: list[list[int]]
    targets: list[tuple[int, list[tuple[int, int]]]]


def _option_plan(options: list[list[int]]) -> _OptionPlan:
    start = _shared_start(options)
    tail = min(_shared_start([option[::-1] for option in options]), min(map(len, options)) - start)
    if all(len(option) - tail - start == 1 for option in options):
        return _OptionPlan([options[0][:start]], [(0, [(start - 1, option[start])]) for option in options])
    kept = [option[: len(option) - tail] for option in options]
    targets = [(k, [(i - 1, ids[i]) for i in range(start, len(ids))]) for k, ids in enumerate(kept)]
    return _OptionPlan(kept, targets)


def _shared_start(sequences: list[list[int]]) -> int:
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))


def _unlabelled(ids: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def _next_log_probs(
    model: nn.Module, batch: Any, lengths: list[int], plans: list[_OptionPlan], indices: list[int]
) -> list[list[float]]:
    """For each row, the log-likelihood of each option."""
    inputs = _to_device(batch, model)
    logits = model(**inputs).logits
    mask = inputs["attention_mask"]
    first = mask.long().argmax(-1).tolist()
    found, offset = [], 0
    for index in indices:
        plan = plans[index]
        values = []
        for sequence, pairs in plan.targets:
            row = offset + sequence
            positions = torch.tensor([first[row] + position for position, _ in pairs], device=logits.device)
            tokens = torch.tensor([token for _, token in pairs], device=logits.device)
            scores = logits[row, positions].double().log_softmax(-1)
            values.append(float(scores.gather(-1, tokens.unsqueeze(-1)).sum()))
        found.append(values)
        offset += len(plan.sequences)
    return found


def completion_scores(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], Any],
    *,
    batch_size: int = 16,
    draw: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> CompletionScores:
    """The likelihood of each row's learned tokens.

    Args:
        model: with a language-modelling head.
        rows: encoded, with ``labels`` of -100 on what is not scored.
        collate: pads a list of rows to a batch, labels with -100.
        batch_size: rows a forward pass.
        draw: (seed, number) of a posterior draw to score under; None is the mean.
        progress: told how many rows are done, batch by batch.
    """
    nll, tokens, correct = np.zeros(len(rows)), np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    sampled = posterior_sampling(model, draw[0], first=draw[1], resample=False) if draw else nullcontext()
    with evaluating(model), sampled:
        for indices in _batches(rows, batch_size):
            batch = _to_device(collate([rows[i] for i in indices]), model)
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            kept = labels != -100
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
            nll[indices] = losses.double().sum(-1).cpu().numpy()
            tokens[indices] = kept.sum(-1).cpu().numpy()
            correct[indices] = ((logits.argmax(-1) == labels) & kept).sum(-1).cpu().numpy()
            if progress is not None:
                progress(len(indices))
    return CompletionScores(nll, tokens, correct)
