"""Plain text: every line that is not blank is a row with the column ``text``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from monteclora.data.table import Row, Table
from monteclora.data.text import encoding_of, text_lines
from monteclora.errors import DataError

__all__ = ["open_text"]


def open_text(path: Path) -> Table:
    """Open a corpus. Raises DataError where every line is blank."""
    encoding = encoding_of(path, guess=True)

    def rows() -> Iterator[Row]:
        for number, line in text_lines(path, encoding):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")}

    if next(rows(), None) is None:
        raise DataError(f"{path} is empty", "Give a file with text.")
    notes = (f"{path}: every line is a row", *(() if encoding == "utf-8" else (f"{path}: the encoding is {encoding}",)))
    return Table(str(path), ("text",), rows, notes=notes)
