"""The rows of a table, checked one by one, as columns of a ``datasets.Dataset``.

Classification: ``text``, perhaps ``text_pair``, ``label`` (an id). Causal LM: ``prompt`` and
``completion``, with ``options`` and ``answer`` where the task has them; or ``messages``.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from monteclora.config import brief
from monteclora.data.columns import Columns, listed
from monteclora.data.files import Table
from monteclora.data.labels import LabelSet, label_key
from monteclora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

__all__ = ["CheckedRows", "read_rows"]

_ROLES = ("system", "user", "assistant", "tool")
_MOST_ROWS, _MOST_CHARACTERS = 10_000, 2**24  # held as Python objects before they become an Arrow table


@dataclass(frozen=True)
class CheckedRows:
    """Checked columns of a table, their row numbers, and the labels as they stand in the file."""

    table: Table
    chunks: list[pa.Table]
    numbers: array[int]
    label_keys: list[str]

    def to_dataset(self, labels: LabelSet | None) -> Dataset:
        """The rows as a dataset; with ``labels``, a column of ids. DataError for a label outside the set."""
        import datasets
        import pyarrow as pa
        from datasets.table import InMemoryTable

        data = pa.concat_tables(self.chunks)
        if labels is not None and self.label_keys:
            rows = zip(self.label_keys, self.numbers, strict=True)
            ids = array("q", (labels.id_of(key, self.table.place(number)) for key, number in rows))
            data = data.append_column("label", pa.array(ids, pa.int64()))
        # a fingerprint that is given is not computed, from a pickled copy of all rows
        return datasets.Dataset(InMemoryTable(data), fingerprint=uuid4().hex)


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
            f"{table.name} has no column {absent[0]!r}; it has {listed(table)}",
            "Give every file of a task the same columns.",
        )
    read = _classification_row if columns.kind == "classification" else _causal_row
    keys: dict[str, str] = {}  # one object for all rows of a label
    label_keys: list[str] = []
    numbers = array("q")
    chunks = _Chunks()
    for number, row in table.rows():
        place = table.place(number)
        chunks.add(read(row, columns, place), place)
        numbers.append(number)
        if columns.kind == "classification" and columns.target:
            key = _label(row.get(columns.target), place)
            label_keys.append(keys.setdefault(key, key))
    return CheckedRows(table, chunks.finish(), numbers, label_keys)


class _Chunks:
    """Collects rows as Arrow tables, which hold text in a fraction of what Python's objects take."""

    def __init__(self) -> None:
        self._done: list[pa.Table] = []
        self._rows: list[dict[str, Any]] = []
        self._characters = 0
        self._names: tuple[str, ...] | None = None

    def add(self, row: dict[str, Any], place: str) -> None:
        """Add a row. Raises DataError when it has other columns than the first."""
        names = tuple(row)
        if self._names is None:
            self._names = names
        if names != self._names:
            odd = ", ".join(sorted(set(names) ^ set(self._names)))
            raise DataError(
                f"{place} and the rows before it do not both have {odd}", "Give it to all rows, or to none."
            )
        self._rows.append(row)
        self._characters += sum(len(value) for value in row.values())
        if len(self._rows) >= _MOST_ROWS or self._characters >= _MOST_CHARACTERS:
            self._flush()

    def finish(self) -> list[pa.Table]:
        """The tables, all of one schema."""
        if self._rows or not self._done:
            self._flush()
        return self._done

    def _flush(self) -> None:
        import pyarrow as pa

        message = pa.struct([("role", pa.string()), ("content", pa.string())])
        types = {"messages": pa.list_(message), "options": pa.list_(pa.string())}
        schema = pa.schema([(name, types.get(name, pa.string())) for name in self._names or ()])
        self._done.append(pa.Table.from_pylist(self._rows, schema))
        self._rows, self._characters = [], 0


def _classification_row(row: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    names = ("text", "text_pair")
    return {ours: _text(row, name, place) for ours, name in zip(names, columns.text, strict=False)}


def _causal_row(row: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    if columns.text == ("messages",):
        return {"messages": _messages(row.get("messages"), place)}
    first, *more = columns.text
    prompt = "\n\n".join([_text(row, first, place), *(_text(row, name, place) for name in more if row.get(name))])
    result: dict[str, Any] = {"prompt": prompt}
    if columns.target:
        result["completion"] = _text(row, columns.target, place)
        if isinstance(row.get("options"), list):
            result |= _options(row, result["completion"], place)
    return result


def _options(row: dict[str, Any], completion: str, place: str) -> dict[str, Any]:
    options, answer = row["options"], row.get("answer")
    if len(options) < 2 or not all(isinstance(option, str) and option for option in options):
        raise DataError(f"{place}: options is not a list of two texts or more", "Write the words to choose from.")
    if not isinstance(answer, str) or answer not in options or answer not in completion:
        raise DataError(
            f"{place}: the answer {brief(answer)} is not one of the options, or not in the completion",
            "Write the right option into both.",
        )
    return {"options": options, "answer": answer}


def _text(row: dict[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{place} has no text in the column {name!r}", "Fill it in or remove the row.")
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text in the column {name!r}, found {brief(value)}", "Write it as text.")
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
            raise DataError(f"{place}: the role {brief(message.get('role'))} is not one of {', '.join(_ROLES)}", hint)
        _text(message, "content", place)
    if not value or value[-1]["role"] != "assistant":
        raise DataError(f"{place}: the last message is not the assistant's", hint)
    if value[0]["role"] == "assistant":
        raise DataError(f"{place}: the first message is the assistant's, it answers nothing", hint)
    return [{"role": message["role"], "content": message["content"]} for message in value]
