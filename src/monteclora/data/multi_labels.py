"""Several labels of a row: a list, one text that a separator divides, or a column of 0 and 1 for each label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from monteclora.config import brief
from monteclora.data.coded import distinct
from monteclora.data.labels import LabelSet, describe_labels, label_key
from monteclora.data.written_lists import written_list
from monteclora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "SEPARATORS",
    "LabelsKey",
    "MultiLabelSet",
    "describe_label_sets",
    "read_flags",
    "read_labels",
    "separator_of",
]

LabelsKey = tuple[str, ...] | str
"""The labels of a row as :func:`label_key` gives them, each once; or a 0 or 1 for each label, some of them alike; or
the text that holds them."""
SEPARATORS = ("|", ";", ",")
_FLAGS = {"1": True, "true": True, "0": False, "false": False}


def read_labels(value: Any) -> LabelsKey:
    """The labels in a cell; an empty list or text is a row without any.

    Raises:
        ValueError: the cell is missing, or a label in it is none; the message says which.
    """
    listed = written_list(value) if isinstance(value, str) else value
    if isinstance(listed, list | tuple):
        key = tuple(map(label_key, listed))
        return key if _are_flags(key) else tuple(dict.fromkeys(key))
    if value is None:
        raise ValueError("has no list of labels (write an empty one where none fits)")
    return label_key(value) if not isinstance(value, str) or value.strip() else ""


def _are_flags(key: LabelsKey) -> bool:
    """Whether a list has a 0 or 1 for each label: one of names repeats none, and one of three labels or more does."""
    return not isinstance(key, str) and len(set(key)) < len(key) and _FLAGS.keys() >= set(key)


def read_flags(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    """The names of the columns that hold 1. Raises ValueError for one that holds neither 0 nor 1."""
    found = []
    for name in columns:
        try:
            flag = _FLAGS[label_key(row.get(name))]
        except (KeyError, ValueError):
            raise ValueError(f"has {brief(row.get(name))} in the column {name!r}, expected 0 or 1") from None
        if flag:
            found.append(name)
    return tuple(found)


def separator_of(keys: Iterable[LabelsKey], names: Sequence[str] = ()) -> str | None:
    """What divides labels that are written as one text: the first of :data:`SEPARATORS` that occurs in one.

    None where all are lists, which do not tell, and "" where each text is one label. What is part of a label, of those
    with known ``names`` or in a list, divides nothing.
    """
    texts, known = [], set(names)
    for key in keys:
        if not isinstance(key, str):
            known.update(key)
        elif key:
            texts.append(key)
    if not texts:
        return None
    usable = [each for each in SEPARATORS if not any(each in name for name in known)]
    return next((each for each in usable if any(each in text for text in texts)), "")


class MultiLabelSet:
    """The labels of which a row may have several; see :class:`monteclora.data.labels.Targets`.

    Args:
        names: label names.
        separator: divides labels that are written as one text; "" where each such text is a label, and None where
            that is not known, which is then taken for the same.
        ids_count: see :class:`LabelSet`; whether, likewise, a list of 0 and 1 has one for each of three names or more.
            Of two, it could be one of ids.
    """

    def __init__(self, names: Sequence[str], separator: str | None = None, ids_count: bool = True) -> None:
        self.names = tuple(names)
        self._one, self.separator, self._flags_count = LabelSet(names, ids_count), separator, ids_count

    @classmethod
    def from_keys(cls, keys: Iterable[LabelsKey], separator: str | None) -> MultiLabelSet:
        """The set of the labels that occur, in the order of :meth:`LabelSet.from_labels`."""
        names: set[str] = set()
        for key in distinct(keys):
            with suppress(ValueError):  # raised with its place by value_of
                names.update(_parts(key, separator))
        return cls(LabelSet.from_labels(names).names, separator, ids_count=False)

    @property
    def type(self) -> pa.DataType:
        """A list of int8."""
        import pyarrow as pa

        return pa.list_(pa.int8())

    def value_of(self, key: LabelsKey, place: str) -> list[int]:
        """For each label 1 where the row has it, else 0; DataError naming ``place`` for one outside the set."""
        if self._flags_count and len(key) == len(self.names) > 2 and _are_flags(key):
            return [int(_FLAGS[flag]) for flag in key]
        found = [0] * len(self.names)
        try:
            parts = _parts(key, self.separator)
        except ValueError as error:
            raise DataError(f"{place} {error}", "Correct the labels or remove the row.") from None
        for part in parts:
            found[self._one.value_of(part, place)] = 1
        return found


def _parts(key: LabelsKey, separator: str | None) -> tuple[str, ...]:
    """As :func:`label_key` gives them. Raises ValueError for a list of 0 and 1, which does not name them."""
    if not isinstance(key, str):
        if _are_flags(key):
            flags = brief(f"[{', '.join(key)}]", quotes=False)
            raise ValueError(
                f"has the labels {flags}, a 0 or 1 for each label: expected names, a column for each label "
                "(data.label_columns), or in data.label_names as many labels in their order, three or more"
            )
        return key
    parts = key.split(separator) if separator else [key]
    return tuple(label_key(part) for part in parts if part.strip())


def describe_label_sets(names: Sequence[str], splits: Mapping[str, Sequence[Sequence[int]]]) -> list[str]:
    """The labels of each split for people, as :func:`describe_labels`, and the rows without any."""
    ids = {split: [i for row in rows for i, flag in enumerate(row) if flag] for split, rows in splits.items()}
    without = {split: sum(not any(row) for row in rows) for split, rows in splits.items()}
    return describe_labels(names, ids) + [f"{split}: {n:,} rows without a label" for split, n in without.items() if n]
