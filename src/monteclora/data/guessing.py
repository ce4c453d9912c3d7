"""Which columns of a table are its texts and its labels, judged by what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from monteclora.config import brief
from monteclora.data.table import Table
from monteclora.errors import DataError

__all__ = ["Guess", "guess_columns"]

_ROWS = 2000  # that are looked at
_WORDS = 3  # a text has more, on average
_ROWS_PER_LABEL = 3  # a column with fewer rows for each value holds no labels


@dataclass(frozen=True)
class Guess:
    """Names of the columns of texts and of labels."""

    text: str
    label: str


def guess_columns(table: Table) -> Guess | None:
    """The column with the longest texts, most of them different, and the only one with a few values that repeat.

    Gives None where either is not there, or where two columns may be the labels.

    Raises:
        DataError: the names of the columns are a row, it seems.
    """
    rows = [row for _, row in islice(table.each(), _ROWS) if not isinstance(row, DataError)]
    columns = {name: [row[name] for row in rows if row.get(name) not in (None, "")] for name in table.columns}
    words = {name: _mean_words(values) for name, values in columns.items()}
    texts = [name for name, mean in words.items() if mean > _WORDS and _distinct(columns[name]) > len(rows) / 2]
    labels = [
        name
        for name, values in columns.items()
        if words[name] <= _WORDS and 2 <= _distinct(values) <= len(values) / _ROWS_PER_LABEL
    ]
    if not texts or len(labels) != 1:
        return None
    if not table.keyed and labels[0] in map(str, columns[labels[0]]):
        raise DataError(
            f"{table.name} has no header, it seems: its first line names a column {brief(labels[0])}, and other lines "
            "have that as a value",
            "Write a first line that names the columns, such as text,label.",
        )
    return Guess(max(texts, key=words.__getitem__), labels[0])


def _mean_words(values: list[Any]) -> float:
    return float(np.mean([len(str(value).split()) for value in values])) if values else 0.0


def _distinct(values: list[Any]) -> int:
    return len({str(value) for value in values})
