"""``calibration.json``: what was fitted to a run's validation rows after training, without changing its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monteclora.errors import CheckpointError
from monteclora.system.atomic import write_file

__all__ = ["CALIBRATION_FILE", "read_calibration", "weights_sha256", "write_calibration"]

CALIBRATION_FILE = "calibration.json"
_FORMAT = 1


def read_calibration(folder: Path) -> dict[str, Any]:
    """What the file in a run folder holds; empty where there is none.

    Raises:
        CheckpointError: it is damaged or of a later format.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return {}
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = int(document.pop("format"))
        if not all(isinstance(part, dict) for part in document.values()):
            raise TypeError("a section is no object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__})", "Remove it; what it holds is fitted again."
        ) from None
    if version > _FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, this version reads format {_FORMAT}", "Upgrade monteclora."
        )
    return document


def write_calibration(folder: Path, sections: Mapping[str, Any]) -> Path:
    """Write the file, whole or not at all."""
    path = folder / CALIBRATION_FILE
    write_file(path, (json.dumps({"format": _FORMAT, **sections}, indent=2, ensure_ascii=False) + "\n").encode())
    return path


def weights_sha256(adapter: Path) -> str:
    """The checksum of an adapter's weights and posterior: what was fitted to others does not count."""
    digest = hashlib.sha256()
    for path in sorted(adapter.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
