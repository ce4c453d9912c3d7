"""Labels as they stand in the data to ids, and back to names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from monteclora.config import brief
from monteclora.errors import DataError

__all__ = ["LabelSet", "label_key"]

_INTEGER = re.compile(r"-?\d{1,4000}", re.ASCII)  # int() reads no more
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def label_key(value: Any) -> str:
    """A label as text: surrounding blanks removed, booleans in lower case, whole numbers without a fraction.

    Raises:
        ValueError: there is no label, it is not text, a whole number or a boolean, or it holds what cannot be printed;
            the message says which.
    """
    match value:
        case bool():
            return str(value).lower()
        case int() if value.bit_length() <= 64:
            return str(value)
        case float() if value.is_integer():
            return str(int(value))
        case str() if _CONTROL.search(value.strip()):
            raise ValueError(f"has the label {brief(value)}, which holds a control character")
        case str() if value.strip():
            return value.strip()
        case None | str():
            raise ValueError("has no label")
    raise ValueError(f"has the label {brief(value)}: labels are names or whole numbers")


class LabelSet:
    """The names of the classes, in the order of their ids.

    Args:
        names: label names.
        ids_count: whether a label may also be an id from 0 to C - 1 in place of a name. A name comes first.
    """

    def __init__(self, names: Sequence[str], ids_count: bool = True) -> None:
        self.names = tuple(names)
        ids = {str(i): i for i in range(len(self.names))} if ids_count else {}
        self._ids = ids | {name: i for i, name in enumerate(self.names)}

    @classmethod
    def from_labels(cls, keys: Iterable[str]) -> LabelSet:
        """The set of the labels that occur: whole numbers in their order, anything else alphabetically.

        Labels 0, 1, ... therefore keep their meaning as ids, and any other integers keep theirs as names.
        """
        distinct = set(keys)
        numeric = all(_INTEGER.fullmatch(key) for key in distinct)
        return cls(sorted(distinct, key=int) if numeric else sorted(distinct), ids_count=False)

    def id_of(self, key: str, place: str) -> int:
        """The id of a label from :func:`label_key`; DataError naming ``place`` when it is not in the set."""
        if key not in self._ids:
            raise DataError(
                f"{place}: the label {brief(key)} is not among {_shortened(self.names)}",
                "Correct the label, or list every label in data.label_names.",
            )
        return self._ids[key]


def _shortened(names: Sequence[str], most: int = 20) -> str:
    listed = ", ".join(brief(name, quotes=False) for name in names[:most])
    return f"the {len(names)} labels {listed}" + (", ..." if len(names) > most else "")
