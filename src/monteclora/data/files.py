"""Opening a data file as a :class:`Table`, by its ending; each defect is named by file and line.

Rows are read one after the other, so that a caller who keeps two columns of a large file holds only these in memory,
and no line may be so long that it alone would fill it. Only JSON documents (``.json``) are held whole.
"""

from __future__ import annotations

import stat
from pathlib import Path

from monteclora.config import brief, nearest
from monteclora.data.delimited import open_delimited
from monteclora.data.excel import open_excel
from monteclora.data.json_files import open_json, open_jsonl
from monteclora.data.parquet import open_parquet
from monteclora.data.plain_text import open_text
from monteclora.data.table import Attempt, Row, Table
from monteclora.data.text import COMPRESSIONS
from monteclora.errors import DataError

__all__ = ["ENDINGS", "Attempt", "Row", "Table", "has_data_ending", "open_table"]

_TEXT = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")
_BINARY = (".parquet", ".xlsx")
ENDINGS = (*_TEXT, *(ending + zipped for ending in _TEXT for zipped in COMPRESSIONS), *_BINARY)


def has_data_ending(path: str | Path) -> bool:
    """Whether the name ends like a file that :func:`open_table` reads."""
    return str(path).lower().endswith(ENDINGS)


def open_table(path: str | Path) -> Table:
    """Open a data file by its ending.

    Raises:
        ConfigError: a workbook is given and openpyxl is missing.
        DataError: the file is missing, not an ordinary file, empty, has no rows, has another ending, cannot be decoded,
            or is damaged. Defects further down are raised while the rows are read.
    """
    path = Path(path)
    size = _size(path)
    if not has_data_ending(path):
        raise DataError(
            f"cannot tell the format of {path}",
            f"Name it with one of {', '.join((*_TEXT, *_BINARY))}; text files may be compressed (.gz, .zst).",
        )
    if size == 0:
        raise DataError(f"{path} is empty", "Give a file with rows.")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSIONS]
    match suffix := suffixes[-1]:
        case ".parquet":
            return open_parquet(path)
        case ".xlsx":
            return open_excel(path)
        case ".csv" | ".tsv":
            return open_delimited(path, suffix)
        case ".json":
            return open_json(path)
        case ".txt":
            return open_text(path)
    return open_jsonl(path)


def _size(path: Path) -> int:
    """The bytes of an ordinary file; opening a pipe would wait for its writer."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        near = nearest(path.name, (file.name for file in path.parent.glob("*") if file.name != path.name))
        hint = (
            f"Did you mean {path.parent / near}?"
            if near
            else "Check the path; it leads from the recipe's folder, or from here."
        )
        if not str(path).isprintable():  # of "C:\new\table.csv" in double quotes YAML makes a line break and a tab
            hint = "Write each backslash of the path twice in double quotes, or use single quotes."
            raise DataError(f"there is no file {str(path)!r}", hint) from None
        raise DataError(f"there is no file {path}", hint) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot read {brief(str(path), 300, quotes=False)}: {reason}", "Check the path.") from None
    if stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path} is a folder, a file is expected", "Give one of the files in it.")
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is not an ordinary file", "Write its content to a file, and give that.")
    return found.st_size
