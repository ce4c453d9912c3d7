"""JSON lines, and JSON documents that hold a list of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monteclora.config import brief
from monteclora.data.table import Attempt, Table
from monteclora.data.text import COMPRESSIONS, encoding_of, text_lines
from monteclora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["open_json", "open_jsonl"]

_BLOCK = 2**20  # bytes that the fast reader takes at once; a longer line is left to the other one
_DEEP = 20  # levels; Python stops at some hundreds, and says where
_HINT = 'Write rows as {"text": ..., "label": ...}.'


def open_jsonl(path: Path) -> Table:
    """Open a file of one JSON object a line. Its columns are the keys of all rows, in the order of their first use."""
    encoding = encoding_of(path, guess=False)

    def attempts() -> Iterator[Attempt]:
        for number, line in text_lines(path, encoding):
            if line.strip():
                try:
                    yield number, _json_object(path, number, line)
                except DataError as error:
                    yield number, error

    at_once = _at_once(path) if encoding == "utf-8" else None
    columns = _keys(path, encoding) if at_once is None else tuple(at_once.column_names)
    if columns is None:
        raise DataError(f"{path} is empty", "Give a file with rows.")
    notes = () if encoding == "utf-8" else (f"{path}: the encoding is {encoding}",)
    columnar = None if at_once is None else _flat(at_once)
    del at_once
    table = Table.of_attempts(str(path), columns, attempts, notes=notes, keyed=True, columnar=columnar)
    if not columns:
        for _ in table.rows():  # raises what is wrong with the first row, unless that is {}
            raise DataError(f"{path} has no row with a key", _HINT)
    return table


def _at_once(path: Path) -> pa.Table | None:
    """All rows, where they are sure to be what reading line by line gives; else None.

    Numbers and texts may be of other types: see :mod:`monteclora.data.columnar`.
    """
    import pyarrow as pa
    from pyarrow import json as arrow

    from monteclora.data.scan import plain_lines

    if path.suffix.lower() in COMPRESSIONS or not (lines := plain_lines(path)):
        return None
    try:
        # In one thread, and with memory that is given back at once, the peak is a sixth lower.
        options = arrow.ReadOptions(use_threads=False, block_size=_BLOCK)
        found = arrow.read_json(path, options, memory_pool=pa.system_memory_pool())
    except pa.ArrowException:
        return None
    shallow = all(str(column.type).count("<") <= _DEEP for column in found.columns)
    return found if found.num_rows == lines and found.num_columns and shallow else None


def _flat(table: pa.Table) -> Callable[[Sequence[str]], pa.Table | None]:
    """Selects columns; lists and records, which are read row by row, are not kept in memory for that."""
    import pyarrow as pa

    kept = table.select([each.name for each in table.schema if not pa.types.is_nested(each.type)])
    return lambda names: kept.select(names) if set(names) <= set(kept.column_names) else None


def _keys(path: Path, encoding: str) -> tuple[str, ...] | None:
    """The keys of all lines that are objects; those that are not are named when the rows are read."""
    found: dict[str, None] = {}
    known: set[str] = set()
    blank = True
    for _, line in text_lines(path, encoding):
        if line.isspace():
            continue
        blank = False
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and not known.issuperset(row):
            found.update(dict.fromkeys(row))
            known = set(found)
    return None if blank else tuple(found)


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            f"{path}, line {number} is not JSON: {message}", "Write one complete JSON object a line."
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{path}, line {number} is not a JSON object", _HINT)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {brief(key)} is given twice")
            seen.add(key)
    return result


def open_json(path: Path) -> Table:
    """Open a JSON document: a list of rows, or an object whose one list is the rows, such as ``{"data": [...]}``.

    A file of that ending that holds JSON lines is read as such. The document is held in memory.
    """
    encoding = encoding_of(path, guess=False)
    lines = (line.lstrip() for _, line in text_lines(path, encoding) if line.strip())
    first, second = next(lines, ""), next(lines, "")
    if not first:
        raise DataError(f"{path} is empty", "Give a file with rows.")
    if first.startswith("{") and _is_object(first):
        row = json.loads(first)
        if row and not _only_list(row) and (second or not _is_turned(row)):
            return open_jsonl(path)
    text = "".join(line for _, line in text_lines(path, encoding))
    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", "Write a list of rows, or one row a line as .jsonl.") from None
    listed = found if isinstance(found, list) else _only_list(found)
    if not listed and _is_turned(found):
        raise DataError(
            f"{path} holds columns, or rows by a key, where a list of rows is expected",
            'Write one; of pandas it is to_json(..., orient="records").',
        )
    if not listed:
        raise DataError(f"{path} holds no list of rows", f'{_HINT} A document is [...] or {{"data": [...]}}.')
    return _list_table(path, listed)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _only_list(document: Any) -> list[Any] | None:
    """The value of ``data``, else the one value that is a list of objects."""
    if not isinstance(document, dict):
        return None
    lists = {
        key: value
        for key, value in document.items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and not _is_conversation(value)
    }
    if "data" in lists:
        return lists["data"]
    return next(iter(lists.values())) if len(lists) == 1 and len(document) == 1 else None


def _is_turned(document: Any) -> bool:
    """Whether an object holds several columns of equal length, or several rows by their keys, as pandas writes them."""
    values = list(document.values()) if isinstance(document, dict) else []
    if len(values) < 2 or any(map(_is_conversation, values)):
        return False
    if all(isinstance(value, dict) for value in values):
        return all(value.keys() == values[0].keys() for value in values)
    return all(isinstance(value, list) and len(value) == len(values[0]) for value in values)


def _is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, which stands in a row; rows may have a column ``from`` or ``role`` too."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return False
    keys = value[0].keys()
    return ("role" in keys and not keys.isdisjoint(("content", "tool_calls"))) or {"from", "value"} <= keys


def _list_table(path: Path, listed: list[Any]) -> Table:
    def attempts() -> Iterator[Attempt]:
        for number, row in enumerate(listed, start=1):
            wrong = DataError(f"{path}, row {number} is not a JSON object", _HINT)
            yield number, row if isinstance(row, dict) else wrong

    columns = dict.fromkeys(key for row in listed if isinstance(row, dict) for key in row)
    return Table.of_attempts(str(path), tuple(columns), attempts, unit="row", keyed=True)
