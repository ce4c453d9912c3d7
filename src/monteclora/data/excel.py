"""The first sheet of a workbook, read row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from monteclora.data.table import Attempt, Table, check_columns, with_rows
from monteclora.errors import ConfigError, DataError

__all__ = ["open_excel"]


def open_excel(path: Path) -> Table:
    """Open an .xlsx file; its first row that is not empty holds the names of the columns.

    Raises:
        ConfigError: openpyxl is missing.
        DataError: the file is no workbook, or its first sheet has no rows.
    """
    try:
        import openpyxl
    except ImportError:
        raise ConfigError(f"reading {path} needs openpyxl", "Run `pip install 'monteclora[excel]'`.") from None

    def cells() -> Iterator[tuple[int, tuple[Any, ...]]]:
        try:
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            try:
                for number, values in enumerate(book.worksheets[0].iter_rows(values_only=True), start=1):
                    if any(value is not None for value in values):
                        yield number, values
            finally:
                book.close()
        except (BadZipFile, KeyError, OSError, IndexError) as error:
            raise DataError(f"{path} is not a whole workbook: {error}", "Save it again as .xlsx.") from None

    header = next(cells(), None)
    if header is None:
        raise DataError(f"{path} is empty", "Give a file with rows.")
    names = ["" if value is None else str(value).strip() for value in header[1]]
    while names and not names[-1]:
        names.pop()
    columns = check_columns(str(path), names)

    def attempts() -> Iterator[Attempt]:
        read = cells()
        next(read)
        for number, values in read:
            if any(value is not None for value in values[len(columns) :]):
                yield number, DataError(f"{path}, row {number} has a value beyond the header", "Name its column.")
                continue
            filled = (*values, *[None] * len(columns))[: len(columns)]
            yield number, dict(zip(columns, filled, strict=True))

    return with_rows(Table.of_attempts(str(path), columns, attempts, unit="row"), "has a header and no rows")
