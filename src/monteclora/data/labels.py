"""Labels as they stand in the data to ids, and back to names."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from monteclora.config import brief
from monteclora.data.coded import Coded, distinct
from monteclora.data.written_lists import written_list
from monteclora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["LabelSet", "Targets", "describe_labels", "label_key", "refuse_scores"]

_INTEGER = re.compile(r"-?\d{1,4000}", re.ASCII)  # int() reads no more
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_WHOLE = re.compile(r"(-?\d{1,4000})\.0+", re.ASCII)
_MISSING = frozenset(("nan", "n/a", "#n/a", "<na>", "null"))  # as spreadsheets, R, pandas and SQL write it
_BOOLEANS = frozenset(("True", "False", "TRUE", "FALSE"))  # of Python and spreadsheets; JSON: lower case
_MOST_NUMBERS = 100  # of different whole numbers; scores rather than classes when most rows have their own


def label_key(value: Any) -> str:
    """A label as text, the same whatever kind of file it came from.

    Surrounding blanks are removed, characters composed (NFC), booleans written in lower case, and whole numbers without
    a fraction.

    Raises:
        ValueError: there is no label (nothing, or a mark such as ``NaN`` or ``N/A``), it is not text, a whole number or
            a boolean, or it holds what cannot be printed; the message says which.
    """
    match value:
        case bool():
            return str(value).lower()
        case int() if value.bit_length() <= 64:
            return str(value)
        case float() if value.is_integer():
            return str(int(value))
        case float() if math.isnan(value):
            raise ValueError("has no label (nan)")
        case str() if _CONTROL.search(value.strip()):
            raise ValueError(f"has the label {brief(value)}, which holds a control character")
        case str() if value.strip().lower() in _MISSING:
            raise ValueError(f"has no label ({value.strip()})")
        case str() if (listed := written_list(value)) is not None:
            return label_key(listed)
        case str() if value.strip():
            return _normal(value)
        case None | str():
            raise ValueError("has no label")
        case float():
            raise ValueError(
                f"has the label {brief(value)}: labels are names or whole numbers (scores need data.kind regression)"
            )
        case list() | tuple():
            raise ValueError(f"has the labels {brief(value)}: several labels of a row need data.kind multi_label")
    raise ValueError(f"has the label {brief(value)}: labels are names or whole numbers")


def _normal(text: str) -> str:
    name = unicodedata.normalize("NFC", text.strip())
    if name in _BOOLEANS:
        return name.lower()
    whole = _WHOLE.fullmatch(name)
    return whole[1] if whole else name


class Targets(Protocol):
    """What is learned of texts: how what stands in a file becomes the column ``label``."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """Of the labels; None for scores."""
        ...

    @property
    def type(self) -> pa.DataType:
        """Of the column."""
        ...

    def value_of(self, key: Any, place: str) -> Any:
        """The value for what stands in a row of that place. Raises DataError where it has none."""
        ...


class LabelSet:
    """The names of the classes, in the order of their ids.

    Args:
        names: label names.
        ids_count: whether a label may also be an id from 0 to C - 1 in place of a name. A name comes first.
    """

    def __init__(self, names: Sequence[str], ids_count: bool = True) -> None:
        self.names: tuple[str, ...] = tuple(names)
        ids = {str(i): i for i in range(len(self.names))} if ids_count else {}
        self._ids = ids | {_normal(name): i for i, name in enumerate(self.names)}

    @classmethod
    def from_labels(cls, keys: Iterable[str]) -> LabelSet:
        """The set of the labels that occur: whole numbers in their order, anything else alphabetically.

        Labels 0, 1, ... therefore keep their meaning as ids, and any other integers keep theirs as names.
        """
        names = distinct(keys)
        numeric = all(_INTEGER.fullmatch(key) for key in names)
        return cls(sorted(names, key=int) if numeric else sorted(names), ids_count=False)

    @property
    def type(self) -> pa.DataType:
        """int64."""
        import pyarrow as pa

        return pa.int64()

    def value_of(self, key: str, place: str) -> int:
        """The id of a label from :func:`label_key`; DataError naming ``place`` when it is not in the set."""
        if key not in self._ids:
            raise DataError(
                f"{place}: the label {brief(key)} is not among {_shortened(self.names)}",
                "Correct the label, or list every label in data.label_names.",
            )
        return self._ids[key]


def refuse_scores(keys: Iterable[str], name: str) -> None:
    """Refuse labels that are measurements: numbers with a fraction, or whole numbers that hardly occur twice.

    Args:
        keys: of the training rows.
        name: of the data.

    Raises:
        DataError: they are; classes that are written as such numbers can be listed.
    """
    counts = _counted(keys)
    if not counts or not all(map(_is_number, counts)):
        return
    fractions = [key for key in counts if not _INTEGER.fullmatch(key)]
    many = len(counts) > _MOST_NUMBERS and 2 * len(counts) > counts.total()
    if fractions or many:
        example = brief(fractions[0] if fractions else next(iter(counts)), quotes=False)
        raise DataError(
            f"the labels of {name} look like scores ({len(counts):,} different numbers, as {example})",
            "Set data.kind to regression, or name another data.label_column; if they are classes, list them in "
            "data.label_names.",
        )


def _is_number(key: str) -> bool:
    try:
        float(key)
    except ValueError:
        return False
    return True


def describe_labels(names: Sequence[str], splits: Mapping[str, Sequence[int]], most: int = 20) -> list[str]:
    """The labels of each split for people: how often each occurs, and what looks like a mistake.

    Args:
        names: of the classes.
        splits: the ids of the rows, by split.
        most: at most this many labels are listed, the most frequent first.
    """
    notes = []
    counts = {split: _counted(ids) for split, ids in splits.items()}
    for split, found in counts.items():
        listed = ", ".join(f"{brief(names[i], quotes=False)} {n:,}" for i, n in found.most_common(most))
        more = f", and {len(found) - most:,} more" if len(found) > most else ""
        notes.append(f"{split}: {len(found):,} labels: {listed}{more}")
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[" ".join(re.sub(r"[\W_]+", " ", name.casefold()).split()) or name].append(name)
    near = [group for group in alike.values() if len(group) > 1]
    if near:
        notes.append(f"labels that differ in capitals or punctuation alone: {_groups(near)}")
    train = counts.get("train", Counter())
    if once := [names[i] for i, n in train.items() if n == 1]:
        notes.append(f"train: labels with a single row ({len(once):,}): {_listed(once)}")
    for split, found in counts.items():
        if split != "train" and (absent := [names[i] for i in train if i not in found]):
            notes.append(f"{split}: labels without a row ({len(absent):,}): {_listed(absent)}")
    return notes


def _counted(values: Iterable[Any]) -> Counter[Any]:
    """As ``Counter``, in the order of their first use, of codes or arrays of ids without a look at each."""
    codes = values.codes if isinstance(values, Coded) else values
    import numpy as np

    if not isinstance(codes, np.ndarray):
        return Counter(codes)
    counts = np.bincount(codes)
    first = np.empty(len(counts), dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # the first use of each is written last
    found = np.flatnonzero(counts)
    names = values.values if isinstance(values, Coded) else range(len(counts))
    return Counter({names[code]: int(counts[code]) for code in found[np.argsort(first[found])].tolist()})


def _groups(groups: Sequence[Sequence[str]], most: int = 10) -> str:
    return "; ".join(_listed(group) for group in groups[:most]) + (", ..." if len(groups) > most else "")


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(brief(name, quotes=False) for name in names[:most]) + (", ..." if len(names) > most else "")


def _shortened(names: Sequence[str], most: int = 20) -> str:
    return f"the {len(names)} labels {_listed(names, most)}"
