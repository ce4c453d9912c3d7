"""Reading what is fitted to a run and kept beside it: tensors with metadata, in a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

__all__ = ["read_fitted"]


def read_fitted(path: Path, framework: Literal["pt", "np"]) -> tuple[dict[str, str], dict[str, Any]]:
    """The metadata and the tensors of a file.

    Args:
        path: of the file.
        framework: torch's tensors or numpy's arrays.

    Raises:
        OSError: it is missing, or no ordinary file.
        SafetensorError: it is damaged.
    """
    if not path.is_file():
        raise OSError("it is no file")  # reading a pipe would never end
    with safe_open(path, framework=framework) as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
