"""The rows of a table, checked one by one, as columns of a ``datasets.Dataset``.

Classification: ``text``, perhaps ``text_pair``, ``label`` (an id). Causal LM: ``prompt`` and
``completion``, with ``options`` and ``answer`` where the task has them; or ``messages``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from monteclora.data.columns import Columns
from monteclora.data.files import Table
from monteclora.data.labels import LabelSet, label_key
from monteclora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["CheckedRows", "read_rows"]

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class CheckedRows:
    """Checked columns of a table, their row numbers, and the labels as they stand in the file."""

    table: Table
    data: dict[str, list[Any]]
    numbers: list[int]
    label_keys: list[str]

    def to_dataset(self, labels: LabelSet | None) -> Dataset:
        """The rows as a dataset; with ``labels``, a column of ids. DataError for a label outside the set."""
        import datasets

        data = dict(self.data)
        if labels is not None and self.label_keys:
            rows = zip(self.label_keys, self.numbers, strict=True)
            data["label"] = [labels.id_of(key, self.table.place(number)) for key, number in rows]
        return datasets.Dataset.from_dict(data)


def read_rows(table: Table, columns: Columns) -> CheckedRows:
    """Read the columns in use.

    Raises:
        DataError: a column is missing, a text or label is empty or of the wrong type, or a conversation is
            malformed; the message names the file and the line.
    """
    needed = (*columns.text, *((columns.target,) if columns.target else ()))
    absent = [name for name in needed if name not in table.columns]
    if absent:
        raise DataError(
            f"{table.name} has no column {absent[0]!r}; it has {', '.join(table.columns)}",
            "Give every file of a task the same columns.",
        )
    read = _classification_row if columns.kind == "classification" else _causal_row
    data: dict[str, list[Any]] = {}
    numbers: list[int] = []
    keys: list[str] = []
    for number, row in table.rows():
        place = table.place(number)
        numbers.append(number)
        for name, value in read(row, columns, place).items():
            data.setdefault(name, []).append(value)
        if columns.kind == "classification" and columns.target:
            keys.append(_label(row.get(columns.target), place))
    return CheckedRows(table, data, numbers, keys)


def _classification_row(row: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    names = ("text", "text_pair")
    return {ours: _text(row, name, place) for ours, name in zip(names, columns.text, strict=False)}


def _causal_row(row: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    if columns.text == ("messages",):
        return {"messages": _messages(row.get("messages"), place)}
    first, *more = columns.text
    prompt = "\n\n".join([_text(row, first, place), *(str(row[name]) for name in more if row.get(name))])
    result: dict[str, Any] = {"prompt": prompt}
    if columns.target:
        result["completion"] = _text(row, columns.target, place)
    for name in ("options", "answer"):
        if columns.target and name in row and "options" in row:
            result[name] = row[name]
    return result


def _text(row: dict[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{place} has no text in the column {name!r}", "Fill it in or remove the row.")
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text in the column {name!r}, found {value!r}", "Write it as text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: the column {name!r} holds half a character (a lone surrogate)", "Correct the text."
        ) from None
    return value


def _label(value: Any, place: str) -> str:
    try:
        return label_key(value)
    except ValueError as error:
        raise DataError(f"{place} {error}", "Correct the label or remove the row.") from None


def _messages(value: Any, place: str) -> list[dict[str, str]]:
    hint = 'Write messages as [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].'
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError(f"{place}: messages is not a list of objects", hint)
    for message in value:
        if message.get("role") not in _ROLES:
            raise DataError(f"{place}: the role {message.get('role')!r} is not one of {', '.join(_ROLES)}", hint)
        _text(message, "content", place)
    if not value or value[-1]["role"] != "assistant":
        raise DataError(f"{place}: the last message is not the assistant's", hint)
    if value[0]["role"] == "assistant":
        raise DataError(f"{place}: the first message is the assistant's, it answers nothing", hint)
    return [{"role": message["role"], "content": message["content"]} for message in value]
