"""Stored predictions of labelled rows, back to what the metrics are functions of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from monteclora.data.kinds import Kind
from monteclora.errors import CheckpointError, ConfigError
from monteclora.metrics.registry import METRICS, Scoring, TokenSums

__all__ = ["ScoredRows", "scored_rows"]


@dataclass(frozen=True)
class ScoredRows:
    """B predicted and labelled rows.

    Attributes:
        scoring: which metrics apply.
        arrays: what they are functions of, of length B each: ``probs`` and ``labels`` of classes and options; ``nll``,
            ``tokens`` and ``correct`` of completions.
    """

    scoring: Scoring
    arrays: tuple[NDArray[np.generic], ...]

    @property
    def rows(self) -> int:
        """B."""
        return len(self.arrays[0])

    def take(self, chosen: NDArray[np.int64]) -> ScoredRows:
        """Some of the rows, each as often as its number is among ``chosen``."""
        return ScoredRows(self.scoring, tuple(array[chosen] for array in self.arrays))

    def measure(self, name: str) -> float:
        """A metric by name; not a number where these rows do not define it."""
        function = METRICS[name].functions[self.scoring]
        if self.scoring == "tokens":
            nll, tokens, correct = (array.sum() for array in self.arrays)
            return function(TokenSums(float(nll), int(tokens), int(correct)))
        if self.scoring == "classes" and name in _OF_COUNTS:
            return _OF_COUNTS[name](_confusion(*self.arrays))
        return function(*self.arrays)


def _confusion(probs: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    """How many rows have each label (rows) and most probable class (columns)."""
    classes = probs.shape[1]
    counts = np.bincount(labels * classes + probs.argmax(1), minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.float64)


def _matthews(counts: NDArray[np.float64]) -> float:
    """As :func:`monteclora.metrics.classification.matthews`; Gorodkin 2004."""
    total, true, predicted = counts.sum(), counts.sum(1), counts.sum(0)
    scale = np.sqrt(total**2 - predicted @ predicted) * np.sqrt(total**2 - true @ true)
    return float((np.trace(counts) * total - true @ predicted) / scale) if scale else 0.0


def _f1(counts: NDArray[np.float64]) -> float:
    """As :func:`monteclora.metrics.classification.f1`."""
    sums = counts.sum(0) + counts.sum(1)
    scores = 2 * np.diag(counts) / np.maximum(sums, 1)
    return float(scores[1] if len(scores) == 2 else scores[sums > 0].mean())


# scikit-learn takes milliseconds for these, whatever the number of rows, and a comparison takes them by the thousand
_OF_COUNTS: Mapping[str, Callable[[NDArray[np.float64]], float]] = {"mcc": _matthews, "f1": _f1}


def scored_rows(kind: Kind, table: pa.Table, folder: Path) -> ScoredRows:
    """The rows of ``predictions.parquet`` that are one evaluation of one split.

    Args:
        kind: of the run's task.
        table: the rows.
        folder: of the run, for messages.

    Raises:
        CheckpointError: the table lacks what an evaluation writes.
        ConfigError: runs of this kind of task cannot be compared row by row.
    """
    readers: Mapping[str, Callable[[pa.Table], ScoredRows]] = {"classification": _classes, "causal_lm": _completions}
    if kind not in readers:
        raise ConfigError(f"{folder} is a run of {kind}, which is not compared", "Compare runs of labels or texts.")
    try:
        return readers[kind](table)
    except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise CheckpointError(
            f"{folder / 'predictions.parquet'} lacks what an evaluation writes ({type(error).__name__}: {error})",
            "Evaluate the run again.",
        ) from None


def _classes(table: pa.Table) -> ScoredRows:
    names = [field.name for field in table.schema.field("probabilities").type]
    rows = table["probabilities"].to_pylist()
    probs = np.array([[row[name] for name in names] for row in rows], dtype=np.float64)
    labels = np.array([names.index(label) for label in table["label"].to_pylist()])
    return ScoredRows("classes", (probs, labels))


def _completions(table: pa.Table) -> ScoredRows:
    if "options" in table.column_names and table["options"].null_count == 0:
        return _options(table)
    columns = ("nll", "tokens", "correct_tokens")
    return ScoredRows("tokens", tuple(np.asarray(table[name].to_pylist(), dtype=np.float64) for name in columns))


def _options(table: pa.Table) -> ScoredRows:
    found: Sequence[Sequence[float]] = table["probabilities"].to_pylist()
    probs = np.zeros((len(found), max(map(len, found))))
    for row, values in zip(probs, found, strict=True):
        row[: len(values)] = values
    pairs = zip(table["options"].to_pylist(), table["label"].to_pylist(), strict=True)
    return ScoredRows("options", (probs, np.array([list(options).index(label) for options, label in pairs])))
