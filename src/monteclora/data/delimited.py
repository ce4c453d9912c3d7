"""csv and tsv files: delimiter, quoting and encoding are found."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from monteclora.data.table import Attempt, Table, check_columns, with_rows
from monteclora.data.text import COMPRESSIONS, encoding_of, text_lines
from monteclora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["open_delimited"]

_LONGEST_FIELD = 2**24  # characters; the csv module's own limit of 131072 is shorter than some documents
_DELIMITERS = (",", ";", "\t", "|")
_SAMPLE = 50  # records that tell the delimiter
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


@dataclass(frozen=True)
class _Dialect:
    """How the fields of a file are written; ``skip`` counts the lines before the header."""

    encoding: str
    delimiter: str
    quoted: bool
    skip: int


def open_delimited(path: Path, suffix: str) -> Table:
    """Open a file with a header.

    Args:
        path: of the file.
        suffix: ``.csv`` or ``.tsv``, which decides between delimiters that fit equally well.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    usual = "\t" if suffix == ".tsv" else ","
    dialect = _dialect(path, usual)
    header = next(_records(path, dialect), None)
    if header is None:
        raise DataError(f"{path} is empty", "Give a file with rows.")
    names = [name.strip() for name in header[1]]
    while names and not names[-1]:
        names.pop()
    columns = check_columns(str(path), names)

    def attempts() -> Iterator[Attempt]:
        records = _records(path, dialect)
        next(records)
        for number, values in records:
            if len(values) > len(columns) and not any(values[len(columns) :]):
                del values[len(columns) :]  # columns without a name and without content
            if len(values) != len(columns):
                yield (
                    number,
                    DataError(
                        f"{path}, line {number} has {len(values)} fields where the header has {len(columns)}",
                        "Put fields that hold the separator in double quotes.",
                    ),
                )
            else:
                yield number, dict(zip(columns, values, strict=True))

    def columnar(names: Sequence[str]) -> pa.Table | None:
        return _at_once(path, replace(dialect, skip=header[0] - 1), columns, names)  # also blank lines before it

    notes = _notes(path, dialect, usual)
    table = Table.of_attempts(str(path), columns, attempts, notes=notes, columnar=columnar)
    return with_rows(table, "has a header and no rows")


def _at_once(path: Path, dialect: _Dialect, columns: Sequence[str], names: Sequence[str]) -> pa.Table | None:
    """Some columns of all rows, where they are sure to be what reading line by line gives; else None."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv as arrow

    from monteclora.data.scan import quotes_of_plain_csv

    plain = path.suffix.lower() not in COMPRESSIONS and dialect.encoding == "utf-8" and dialect.quoted
    if not plain or len(columns) < 2:
        return None  # of a single column, a quoted empty cell is a row and a blank line is none
    quoted = quotes_of_plain_csv(path, dialect.delimiter)
    if quoted is None:
        return None
    try:
        # In one thread, and with memory that is given back at once: it takes less of both than the default.
        found = arrow.read_csv(
            path,
            arrow.ReadOptions(
                column_names=list(columns), skip_rows=dialect.skip, skip_rows_after_names=1, use_threads=False
            ),
            arrow.ParseOptions(delimiter=dialect.delimiter, newlines_in_values=quoted),  # half as fast
            arrow.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=list(names),
                strings_can_be_null=False,
                quoted_strings_can_be_null=False,
            ),
            memory_pool=pa.system_memory_pool(),
        )
    except pa.ArrowException:
        return None
    longest = [pc.max(pc.binary_length(column)).as_py() or 0 for column in found.columns]
    return found if found.num_rows and sum(longest) < _LONGEST_FIELD else None


def _notes(path: Path, dialect: _Dialect, usual: str) -> tuple[str, ...]:
    parts = []
    if dialect.delimiter != usual:
        parts.append(f"fields are separated by {_NAMES.get(dialect.delimiter, repr(dialect.delimiter))}")
    if dialect.encoding != "utf-8":
        parts.append(f"the encoding is {dialect.encoding}")
    if not dialect.quoted:
        parts.append("quotes are part of the text")
    return (f"{path}: {', '.join(parts)}",) if parts else ()


def _dialect(path: Path, usual: str) -> _Dialect:
    encoding = encoding_of(path, guess=True)
    first = next((line for _, line in text_lines(path, encoding)), "")
    delimiter, skip = "", 0
    if first.lower().startswith("sep=") and len(first.rstrip("\r\n")) == 5:  # spreadsheets write it for each other
        delimiter, skip = first[4], 1
    delimiter = delimiter or _delimiter(path, encoding, usual)
    quoted = delimiter != "\t" or _quotes_delimit(path, encoding, skip)
    return _Dialect(encoding, delimiter, quoted, skip)


def _delimiter(path: Path, encoding: str, usual: str) -> str:
    """The usual one where the header has it, else one that gives every record as many fields, else the usual one."""
    widths: dict[str, list[int]] = {}
    for candidate in (usual, *(each for each in _DELIMITERS if each != usual)):
        try:
            sample = islice(_records(path, _Dialect(encoding, candidate, True, 0)), _SAMPLE)
            widths[candidate] = [len(values) for _, values in sample]
        except DataError:
            widths[candidate] = []
    if widths[usual] and widths[usual][0] > 1:
        return usual
    even = [each for each, found in widths.items() if len(set(found)) == 1 and found[0] > 1]
    return max(even, key=lambda each: widths[each][0], default=usual)


def _quotes_delimit(path: Path, encoding: str, skip: int) -> bool:
    """Whether quotes enclose fields in a file with tabs.

    They do not where a quote is never closed in its line while every line has as many tabs as the header: to read
    these as quoted would merge lines.
    """
    tabs: int | None = None
    broken = False
    for number, line in text_lines(path, encoding):
        if number <= skip or not line.strip():
            continue
        if tabs is None:
            tabs = line.count("\t")
        if line.count("\t") != tabs:
            return True
        broken = broken or ('"' in line and not _closed(line))
    return not broken


def _closed(line: str) -> bool:
    try:
        list(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        return False
    return True


def _records(path: Path, dialect: _Dialect) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, each with the number of its first line."""
    lines = (line for number, line in text_lines(path, dialect.encoding) if number > dialect.skip)
    if dialect.quoted:
        reader = csv.reader(lines, delimiter=dialect.delimiter, strict=True)
    else:
        reader = csv.reader(lines, delimiter=dialect.delimiter, quoting=csv.QUOTE_NONE, strict=True)
    while True:
        first_line = reader.line_num + 1 + dialect.skip
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
