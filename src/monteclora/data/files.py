"""Reading csv, tsv, jsonl, jsonl.gz and parquet row by row, each defect named by file and line.

A file is opened as a :class:`Table`: its column names, and its rows as dicts with their number. Rows are read
one after the other, so that a caller who keeps two columns of a large file holds only these in memory, and no line may
be so long that it alone would fill it.
"""

from __future__ import annotations

import csv
import gzip
import json
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any, Literal

from monteclora.config import brief, nearest
from monteclora.errors import DataError

__all__ = ["ENDINGS", "Row", "Table", "has_data_ending", "open_table"]

Row = tuple[int, dict[str, Any]]
ENDINGS = (".csv", ".tsv", ".jsonl", ".jsonl.gz", ".parquet")
_LONGEST_FIELD = 2**24  # characters; the csv module's own limit of 131072 is shorter than some documents
_LONGEST_LINE = 2**26  # bytes, of which a small gzip file can hold thousands of millions


@dataclass(frozen=True)
class Table:
    """Named columns and their rows.

    ``unit`` is what the row numbers count: lines of a text file from 1 (a csv header is line 1), or rows from
    1. ``class_names`` holds the label names that come with the data, by column.
    """

    name: str
    columns: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]
    unit: Literal["line", "row"] = "line"
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def place(self, number: int) -> str:
        """How messages name a row: ``reviews.csv, line 12``."""
        return f"{self.name}, {self.unit} {number}"


def has_data_ending(path: str | Path) -> bool:
    """Whether the name ends like a file that :func:`open_table` reads."""
    return str(path).lower().endswith(ENDINGS)


def open_table(path: str | Path) -> Table:
    """Open a data file by its ending.

    Raises:
        DataError: the file is missing, not an ordinary file, empty, has no rows, has another ending, is not UTF-8, or
            is damaged. Defects further down are raised while the rows are read.
    """
    path = Path(path)
    size = _size(path)
    if not has_data_ending(path):
        raise DataError(f"cannot tell the format of {path}", f"Name it with one of {', '.join(ENDINGS)}.")
    if size == 0:
        raise DataError(f"{path} is empty", "Give a file with rows.")
    match path.suffix.lower():
        case ".parquet":
            return _open_parquet(path)
        case ".csv" | ".tsv":
            return _open_delimited(path)
    return _open_jsonl(path)


def _size(path: Path) -> int:
    """The bytes of an ordinary file; opening a pipe would wait for whoever writes into it."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        near = nearest(path.name, (file.name for file in path.parent.glob("*") if file.name != path.name))
        hint = f"Did you mean {path.parent / near}?" if near else "Check the path; it is relative to here."
        raise DataError(f"there is no file {path}", hint) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot read {brief(str(path), 300, quotes=False)}: {reason}", "Check the path.") from None
    if stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path} is a folder, a file is expected", "Give one of the files in it.")
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is not an ordinary file", "Write its content to a file, and give that.")
    return found.st_size


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, plain or gzip, line ends kept, a byte-order mark removed."""
    offset = 0
    try:
        with _open_binary(path) as file:
            for number in count(1):
                raw = file.readline(_LONGEST_LINE + 1)
                if not raw:
                    return
                if len(raw) > _LONGEST_LINE:
                    raise DataError(
                        f"{path}, line {number} has more than {_LONGEST_LINE:,} bytes", "Write one row a line."
                    )
                if number == 1:
                    _refuse_utf16(path, raw)
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: byte {offset + error.start} is not UTF-8",
                        "Save the file as UTF-8.",
                    ) from None
                if "\0" in line:
                    raise DataError(f"{path}, line {number} holds a NUL byte", "Is this a text file?")
                offset += len(raw)
                yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}", "Get the file again.") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "Check the file's permissions.") from None


def _open_binary(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _refuse_utf16(path: Path, raw: bytes) -> None:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16, UTF-8 is expected", "Save the file as UTF-8.")


def _check_columns(path: Path, columns: list[str]) -> tuple[str, ...]:
    column, times = Counter(columns).most_common(1)[0] if columns else ("", 0)
    if times > 1:
        name = f"the column {brief(column)}" if column else "a column without a name"
        raise DataError(f"{path} has {name} more than once", "Give every column its own name.")
    return tuple(columns)


def _with_rows(table: Table, message: str) -> Table:
    """``table``, or DataError when its first row does not exist or is broken."""
    if next(table.rows(), None) is None:
        raise DataError(f"{table.name} {message}", "Give a file with rows.")
    return table


# csv and tsv


def _open_delimited(path: Path) -> Table:
    header = next(_csv_records(path), None)
    if header is None:
        raise DataError(f"{path} is empty", "Give a file with rows.")
    columns = _check_columns(path, [name.strip() for name in header[1]])

    def rows() -> Iterator[Row]:
        records = _csv_records(path)
        next(records)
        for number, values in records:
            if len(values) != len(columns):
                raise DataError(
                    f"{path}, line {number} has {len(values)} fields where the header has {len(columns)}",
                    "Put fields that hold the separator in double quotes.",
                )
            yield number, dict(zip(columns, values, strict=True))

    return _with_rows(Table(str(path), columns, rows), "has a header and no rows")


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, each with the number of its first line."""
    csv.field_size_limit(_LONGEST_FIELD)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader((line for _, line in _text_lines(path)), delimiter=delimiter, strict=True)
    while True:
        first_line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "Double each quote inside a quoted field, or save the data as .jsonl."
            if "new-line character" in str(error):
                hint = "End each line with a line feed; a carriage return alone does not end one."
            raise DataError(f"{path}, the row that starts in line {first_line}: {error}", hint) from None
        if values:
            yield first_line, values


# jsonl


def _open_jsonl(path: Path) -> Table:
    def rows() -> Iterator[Row]:
        for number, line in _text_lines(path):
            if line.strip():
                yield number, _json_object(path, number, line)

    first = next(rows(), None)
    if first is None:
        raise DataError(f"{path} is empty", "Give a file with rows.")
    return Table(str(path), tuple(first[1]), rows)


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            f"{path}, line {number} is not JSON: {message}", "Write one complete JSON object a line."
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{path}, line {number} is not a JSON object", 'Write rows as {"text": ..., "label": ...}.')
    return value


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {brief(key)} is given twice")
        result[key] = value
    return result


# parquet


def _open_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    def damaged(error: Exception) -> DataError:
        return DataError(f"{path} is not a whole Parquet file: {_first_line(error)}", "Get the file again.")

    def rows() -> Iterator[Row]:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(error) from None
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, dates that Python has not
            raise DataError(
                f"{path}, after row {number}: a value cannot be read: {_first_line(error)}", "Write the file again."
            ) from None

    try:
        names = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise damaged(error) from None
    return _with_rows(Table(str(path), _check_columns(path, names), rows, unit="row"), "has no rows")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
