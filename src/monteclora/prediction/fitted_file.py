"""Reading what is fitted to a run and kept beside it: tensors with metadata, in a safetensors file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from monteclora.errors import CheckpointError

__all__ = ["fitted_file"]


@contextmanager
def fitted_file(
    path: Path, framework: Literal["pt", "np"], newest: int, hint: str
) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """The metadata and the tensors of a file; what is found to be wrong with them in the block is told of the file.

    Args:
        path: of the file.
        framework: torch's tensors or numpy's arrays.
        newest: the latest format that can be read, which is looked at first; files of format 1 may not name it.
        hint: what to do about a damaged file.

    Raises:
        CheckpointError: the file is missing, damaged or of a later format, or the block raised an error of a value.
    """
    try:
        if not path.is_file():
            raise OSError("it is no file")  # reading a pipe would never end
        with safe_open(path, framework=framework) as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        version = int(about.get("format", "1"))
        if version > newest:
            raise CheckpointError(
                f"{path} has format {version}, this version reads format {newest}", "Upgrade monteclora."
            )
        yield about, found
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})", hint) from None
