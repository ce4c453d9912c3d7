"""Tables for a recipe that names its own data: files, or a data set on the hub."""

from __future__ import annotations

import os
import re

from monteclora.data.files import Table, has_data_ending
from monteclora.data.parts import Files, is_pattern, open_files
from monteclora.data.sources import SPLITS, hub_splits
from monteclora.errors import DataError

__all__ = ["file_tables", "hub_tables", "is_hub_name", "looks_like_file"]

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")  # no dot in front: ../x is a path
_OTHER_FORMATS = (".xls", ".gz", ".arrow", ".zip")
_OTHER_NAMES = {"valid": "validation", "val": "validation", "dev": "validation"}


def looks_like_file(task: str) -> bool:
    """Whether a recipe's ``task`` means a file rather than a name, even one that does not exist."""
    ending = has_data_ending(task) or task.lower().endswith(_OTHER_FORMATS)
    return ending or is_pattern(task) or ("/" in task and os.path.isfile(task))


def is_hub_name(task: str) -> bool:
    """Whether ``task`` has the form ``owner/name`` or ``owner/name:config``."""
    return _HUB_NAME.fullmatch(task) is not None


def file_tables(train: Files | None, validation: Files | None, test: Files | None) -> dict[str, Table]:
    """The tables of the files that are given, by split. Raises DataError as ``open_files``."""
    named = zip(SPLITS, (train, validation, test), strict=True)
    return {split: open_files(path) for split, path in named if path is not None}


def hub_tables(task: str) -> dict[str, Table]:
    """The train, validation and test tables of ``owner/name[:config]``.

    Raises:
        DataError: the hub is out of reach, has no such data set, or it has none of these splits.
        UnsafeCodeError: the data set is a program.
    """
    name, _, config = task.partition(":")
    if os.path.exists(name):  # the hub's library would read whatever is in it
        raise DataError(f"{name} is a folder here, not a data set on the hub", "Give it as data.train_file.")
    found = hub_splits(name, config or None)
    tables = {_OTHER_NAMES.get(split, split): table for split, table in found.items()}
    tables = {split: tables[split] for split in SPLITS if split in tables}
    if not tables:
        raise DataError(
            f"{task} has the splits {', '.join(found)} and none of {', '.join(SPLITS)}",
            "Export the ones you need as files and give these.",
        )
    return tables
