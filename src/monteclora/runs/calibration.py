"""``calibration.json``: what was fitted to a run's validation rows after training, without changing its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from monteclora.adapters.storage import POSTERIOR_FILE
from monteclora.runs.documents import read_document, write_document

__all__ = ["CALIBRATION_FILE", "joint_sha256", "read_calibration", "weights_sha256", "write_calibration"]

CALIBRATION_FILE = "calibration.json"
_FORMAT = 1


def read_calibration(folder: Path) -> dict[str, Any]:
    """What the file in a run folder holds; empty where there is none.

    Raises:
        CheckpointError: it is damaged or of a later format.
    """
    hint = "Remove it; what it holds is fitted again."
    return read_document(folder / CALIBRATION_FILE, _FORMAT, _sections, hint) or {}


def _sections(document: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(part, dict) for part in document.values()):
        raise TypeError("a section is no object")
    return document


def write_calibration(folder: Path, sections: Mapping[str, Any]) -> Path:
    """Write the file, whole or not at all."""
    path = folder / CALIBRATION_FILE
    write_document(path, _FORMAT, sections)
    return path


def weights_sha256(adapter: Path, *, posterior: bool = True) -> str:
    """The checksum of an adapter's weights: what was measured with others does not count.

    Args:
        adapter: its folder.
        posterior: whether the posterior counts, which decides draws but not the mean.
    """
    digest = hashlib.sha256()
    for path in sorted(adapter.glob("*.safetensors")):
        if path.name == POSTERIOR_FILE and not posterior:
            continue
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def joint_sha256(adapters: Iterable[Path], *, posterior: bool = True) -> str:
    """The checksum of the weights of several adapters, in whichever order; of one, its :func:`weights_sha256`."""
    found = sorted(weights_sha256(adapter, posterior=posterior) for adapter in adapters)
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()
