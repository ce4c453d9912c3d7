"""One table of several files: a list, a pattern, or the folder of parts that Spark and others write."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from monteclora.config import brief
from monteclora.data.files import Attempt, Table, has_data_ending, open_table
from monteclora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Files", "is_pattern", "open_files", "part_files", "resolved"]

Files = str | Path | Sequence[str]
"""A file, a pattern, a folder of parts, or a list of these."""
_STRIDE = 2**40  # between the row numbers of two files: no file has as many lines


def is_pattern(path: str) -> bool:
    """Whether a path stands for all files that it matches, as in ``data/part-*.csv``."""
    return glob.has_magic(path) and not Path(path).exists()


def resolved(files: str | list[str]) -> str | list[str]:
    """The same, wherever the process is."""
    return str(Path(files).resolve()) if isinstance(files, str) else [str(Path(each).resolve()) for each in files]


def part_files(files: Files) -> list[Path]:
    """The files that are meant, each once: those of a list in its order, of a pattern or folder in that of their names.

    Of a folder, files whose name begins with a dot or an underscore (``_SUCCESS``) are skipped.

    Raises:
        DataError: a pattern matches nothing, or a folder has no data files, has others beside them, or is one that a
            writer has not finished.
    """
    given = [files] if isinstance(files, str | Path) else list(files)
    found = [path for each in given for path in _part_files(os.path.expanduser(each))]
    if not found:
        raise DataError("the list of data files is empty", "Name at least one.")
    return list(dict.fromkeys(found))


def _part_files(path: str) -> list[Path]:
    if is_pattern(path):
        matched = sorted(Path(each) for each in glob.glob(path, recursive=True))
        matched = [each for each in matched if each.is_file()]
        if not matched:
            raise DataError(
                f"no file matches {path}", "Check the pattern; it leads from the recipe's folder, or from here."
            )
        return matched
    try:
        is_folder = stat.S_ISDIR(Path(path).stat().st_mode)
    except (OSError, ValueError):
        is_folder = False  # opening it says what is wrong
    return _parts_of(Path(path)) if is_folder else [Path(path)]


def _parts_of(folder: Path) -> list[Path]:
    names = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    if any(each.name == "_temporary" for each in names):
        raise DataError(f"{folder} holds _temporary: it is still being written", "Wait, or write it again.")
    parts = [each for each in names if not each.name.startswith("_")]
    if not parts:
        raise DataError(f"{folder} is a folder without data files", "Give a file, or a folder of parts.")
    for each in parts:
        if not each.is_file() or not has_data_ending(each):
            what = "a folder" if each.is_dir() else "not a data file"
            raise DataError(
                f"{folder} holds {each.name}, which is {what}",
                f"Give the files as a pattern, such as {folder}/*.jsonl.",
            )
    return parts


def open_files(files: Files) -> Table:
    """Open a file, or several as one table: the columns are those of all of them.

    Rows are numbered in their own file, and messages name it.

    Raises:
        DataError: as :func:`part_files` and :func:`~monteclora.data.files.open_table`, or two files have other columns
            than each other and are not of rows that name their own, as JSON lines are.
    """
    paths = part_files(files)
    tables = [open_table(path) for path in paths]
    first = tables[0]
    if len(tables) == 1:
        return first
    columns = dict.fromkeys(name for table in tables for name in table.columns)
    for table in tables[1:]:
        odd = sorted(set(table.columns) ^ set(first.columns))
        if odd and not (table.keyed and first.keyed):
            raise DataError(
                f"{table.name} and {first.name} do not both have the column {brief(odd[0])}",
                "Give the files the same columns.",
            )

    def attempts() -> Iterator[Attempt]:
        for index, table in enumerate(tables):
            for number, row in table.each():
                yield index * _STRIDE + number, row

    def columnar(names: Sequence[str]) -> pa.Table | None:
        import pyarrow as pa

        found: list[pa.Table] = []
        for table in tables:
            whole = table.columnar(names) if table.columnar and set(names) <= set(table.columns) else None
            if whole is None or (found and whole.schema != found[0].schema):
                return None
            found.append(whole)
        return pa.concat_tables(found)

    def place(number: int) -> str:
        index, own = divmod(number, _STRIDE)
        return tables[index].place(own)

    def short(number: int) -> str:
        index, own = divmod(number, _STRIDE)
        return f"{paths[index].name}:{own}"

    name = str(files) if isinstance(files, str | Path) else f"{first.name} and {len(tables) - 1} more"
    notes = [f"{name}: {len(tables)} files", *(note for table in tables for note in table.notes)]
    return Table.of_attempts(
        name,
        tuple(columns),
        attempts,
        unit="row",
        notes=tuple(notes),
        places=place,
        short=short,
        keyed=True,
        columnar=columnar,
    )
