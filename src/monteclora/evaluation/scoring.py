"""Rows with answers, predicted and measured: classes, answer options, completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from monteclora.data.encoding import encode, encode_completion
from monteclora.errors import DataError
from monteclora.metrics.registry import Scoring, TokenSums, measure
from monteclora.prediction.completions import CompletionPredictions, CompletionScores, predict_completions
from monteclora.prediction.inference import SplitPredictions, predict_classes, predict_options
from monteclora.runs.loading import LoadedRun
from monteclora.system.progress import Progress
from monteclora.tasks.commonsense import option_completions

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Sampling", "Scored", "classify", "score"]

_UNLIMITED = 2**31


@dataclass(frozen=True)
class Sampling:
    """How to predict.

    Attributes:
        num_samples: posterior draws, 0 for none.
        seed: their stream.
        batch_size: sequences a forward pass.
        progress: told how many rows are done.
    """

    num_samples: int
    seed: int
    batch_size: int
    progress: Progress | None = None

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {
            "num_samples": self.num_samples,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "progress": self.progress,
        }


@dataclass(frozen=True)
class Scored:
    """Predictions with what they are worth.

    Attributes:
        predictions: of the rows, in their order.
        point: metrics by name under the posterior's mean.
        posterior: likewise under the mean over draws; None without draws.
        labels: shape (B,), the right class or option; None for completions.
        table: a row each, without its place in the split.
        notes: what was cut, in words.
    """

    predictions: SplitPredictions | CompletionPredictions
    point: Mapping[str, float]
    posterior: Mapping[str, float] | None
    labels: NDArray[np.int64] | None
    table: pa.Table
    notes: tuple[str, ...] = ()


def score(loaded: LoadedRun, rows: Dataset, sampling: Sampling) -> Scored:
    """Predict and measure labelled rows, however their task does it.

    Raises:
        DataError: an option or completion cannot be scored.
    """
    if loaded.kind == "classification":
        return _score_classes(loaded, rows, sampling)
    if {"options", "answer"} <= set(rows.column_names):
        return _score_options(loaded, rows, sampling)
    return _score_completions(loaded, rows, sampling)


def classify(loaded: LoadedRun, rows: Dataset, sampling: Sampling) -> tuple[SplitPredictions, tuple[str, ...]]:
    """Predict the classes of rows of texts; also what was cut, in words."""
    encoded = encode(rows, loaded.kind, loaded.tokenizer, loaded.recipe.data.max_length)
    with loaded.precision():
        found = predict_classes(loaded.model, encoded.dataset.to_list(), loaded.collate, **sampling.arguments())
    return found, _shortened(encoded.shortened, len(rows), loaded)


def _score_classes(loaded: LoadedRun, rows: Dataset, sampling: Sampling) -> Scored:
    predictions, notes = classify(loaded, rows, sampling)
    labels, names = np.asarray(rows["label"]), loaded.label_names or ()
    chosen = predictions.probs.argmax(1)
    columns = {
        **{name: rows[name] for name in ("text", "text_pair") if name in rows.column_names},
        "label": [names[i] for i in labels],
        "prediction": [names[i] for i in chosen],
        "confidence": predictions.probs.max(1),
        "probabilities": pa.StructArray.from_arrays(list(map(pa.array, predictions.probs.T)), names=list(names)),
    }
    return _scored(loaded, "classes", predictions, labels, columns, notes)


def _score_options(loaded: LoadedRun, rows: Dataset, sampling: Sampling) -> Scored:
    encoded, labels, cut = [], [], 0
    for number, row in enumerate(rows):
        options = _options(number, row)
        completions = option_completions(row["completion"], row["answer"], options)
        sequences, excess = _encode_options(row["prompt"], completions, loaded)
        encoded.append(sequences)
        labels.append(options.index(row["answer"]))
        cut += excess > 0
    with loaded.precision():
        found = predict_options(loaded.model, encoded, loaded.collate, **sampling.arguments())
    chosen = found.probs.argmax(1)
    columns = {
        "prompt": rows["prompt"],
        "options": rows["options"],
        "label": rows["answer"],
        "prediction": [row[i] for row, i in zip(rows["options"], chosen, strict=True)],
        "confidence": found.probs.max(1),
        "probabilities": [p[: len(row)].tolist() for p, row in zip(found.probs, rows["options"], strict=True)],
    }
    notes = _shortened(cut, len(rows), loaded)
    return _scored(loaded, "options", found, np.asarray(labels), columns, notes)


def _options(number: int, row: Mapping[str, Any]) -> list[str]:
    options = row["options"]
    if not isinstance(options, list) or len(options) < 2 or row["answer"] not in options:
        raise DataError(
            f"row {number}: expected two options or more with the answer {row['answer']!r} among them, found {options}",
            "Correct the columns options and answer.",
        )
    return options


def _encode_options(
    prompt: str, completions: Sequence[str], loaded: LoadedRun
) -> tuple[list[dict[str, list[int]]], int]:
    """A prompt with each of its completions, and how many tokens too long the longest was.

    All lose the same beginning of the prompt, so that they differ in the completion alone.
    """
    tokenizer, most = loaded.tokenizer, loaded.recipe.data.max_length
    whole = [encode_completion(prompt, completion, tokenizer, _UNLIMITED) for completion in completions]
    excess = max(len(row["input_ids"]) for row in whole) - most
    if excess <= 0:
        return whole, excess
    lengths = [len(row["input_ids"]) - excess for row in whole]
    cut = [
        encode_completion(prompt, completion, tokenizer, length)
        for completion, length in zip(completions, lengths, strict=True)
    ]
    return cut, excess


def _score_completions(loaded: LoadedRun, rows: Dataset, sampling: Sampling) -> Scored:
    encoded = encode(rows, loaded.kind, loaded.tokenizer, loaded.recipe.data.max_length)
    if encoded.dropped:
        raise DataError(
            f"{encoded.dropped} of {len(rows)} rows have no token to score within {loaded.recipe.data.max_length}",
            "Remove rows without an answer.",
        )
    with loaded.precision():
        found = predict_completions(loaded.model, encoded.dataset.to_list(), loaded.collate, **sampling.arguments())
    best = found.predictive or found.point
    columns = {
        **{name: rows[name] for name in ("prompt", "completion", "messages") if name in rows.column_names},
        "nll": best.nll,
        "tokens": best.tokens,
        "correct_tokens": best.correct,
    }
    return Scored(
        predictions=found,
        point=_completion_metrics(found.point),
        posterior=_completion_metrics(found.predictive) if found.predictive else None,
        labels=None,
        table=_table(columns, found),
        notes=_shortened(encoded.shortened, len(rows), loaded),
    )


def _completion_metrics(scores: CompletionScores) -> dict[str, float]:
    sums = TokenSums(float(scores.nll.sum()), int(scores.tokens.sum()), int(scores.correct.sum()))
    return measure("tokens", sums)


def _scored(
    loaded: LoadedRun,
    scoring: Scoring,
    found: SplitPredictions,
    labels: NDArray[np.int64],
    columns: Mapping[str, Any],
    notes: tuple[str, ...],
) -> Scored:
    def measured(probs: NDArray[np.float64]) -> dict[str, float]:
        return measure(scoring, probs, labels, bins=loaded.recipe.evaluation.bins)

    return Scored(
        predictions=found,
        point=measured(found.point),
        posterior=measured(found.probs) if found.num_samples else None,
        labels=labels,
        table=_table(columns, found),
        notes=notes,
    )


def _table(columns: Mapping[str, Any], found: SplitPredictions | CompletionPredictions) -> pa.Table:
    uncertainty = {name: getattr(found, name) for name in ("total", "aleatoric", "epistemic")}
    return pa.table({**columns, **uncertainty})


def _shortened(count: int, rows: int, loaded: LoadedRun) -> tuple[str, ...]:
    return (f"{count} of {rows} rows were shortened to {loaded.recipe.data.max_length} tokens",) if count else ()
