"""JSON documents beside a run that say which format they have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from monteclora.errors import CheckpointError
from monteclora.system.atomic import write_file

__all__ = ["read_document", "write_document"]

T = TypeVar("T")


def read_document(path: Path, newest: int, parse: Callable[[dict[str, Any]], T], hint: str = "Remove it.") -> T | None:
    """What ``parse`` makes of a document; None where there is no file.

    Args:
        path: of the file.
        newest: the latest format that can be read.
        parse: is given the document without its ``format``; a lookup, type or value error in it means damage.
        hint: what to do about a damaged file.

    Raises:
        CheckpointError: the file is damaged or of a later format.
    """
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise OSError("it is no file")  # a pipe would never end
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = int(document.pop("format"))
        if version <= newest:
            return parse(document)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})", hint) from None
    raise CheckpointError(f"{path} has format {version}, this version reads format {newest}", "Upgrade monteclora.")


def write_document(path: Path, version: int, document: Mapping[str, Any]) -> None:
    """Write a document with its format, whole or not at all."""
    text = json.dumps({"format": version, **document}, indent=2, ensure_ascii=False) + "\n"
    write_file(path, text.encode())
