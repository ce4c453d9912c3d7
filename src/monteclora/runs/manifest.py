"""Checkpoint folders: their manifest, and the newest one that is complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monteclora.errors import CheckpointError
from monteclora.system.atomic import remove_folder

__all__ = [
    "Checkpoint",
    "checkpoint_folder",
    "discard_later",
    "newest_complete",
    "read_checkpoint",
    "rotate",
    "write_manifest",
]

_FORMAT = 1
_FILE = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's manifest says of it.

    Attributes:
        path: its folder.
        recipe_sha256: of the recipe that was trained.
        phase: of the run.
        first_step: how many steps the phases before took.
        step: how many steps this phase had taken.
        complete: whether the phase had finished.
        versions: of the packages that wrote it.
        best_step: the step of this phase with the best validation metric; None where none was measured.
    """

    path: Path
    recipe_sha256: str
    phase: str
    first_step: int
    step: int
    complete: bool
    versions: dict[str, str]
    best_step: int | None

    @property
    def total_step(self) -> int:
        """Steps of all phases."""
        return self.first_step + self.step


def checkpoint_folder(folder: Path, total_step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"checkpoint-{total_step}"


def write_manifest(stage: Path, checkpoint: Checkpoint) -> None:
    """Write what the files of a new checkpoint are; the last file to be written into it."""
    facts = {key: value for key, value in dataclasses.asdict(checkpoint).items() if key != "path"}
    files = {str(path.relative_to(stage)): _measure(path) for path in _files(stage)}
    document = {"format": _FORMAT, **facts, "files": files}
    document["sha256"] = _checksum(document)
    (stage / _FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check every file against it.

    Raises:
        CheckpointError: a file is missing, damaged, or the checkpoint is of a later format.
    """
    hint = "Remove the folder; an older checkpoint is used."
    try:
        if not (path / _FILE).is_file():
            raise FileNotFoundError(path / _FILE)  # nor a pipe, which would never end
        document = json.loads((path / _FILE).read_text(encoding="utf-8"))
        version = document["format"]
        if version != _FORMAT:
            raise CheckpointError(
                f"{path} has format {version}, this version reads format {_FORMAT}", "Upgrade monteclora."
            )
        # the first manifests had no checksum of their own
        expected_sha256 = document.pop("sha256", None)
        if expected_sha256 not in (None, _checksum(document)):
            raise CheckpointError(f"{path / _FILE} is damaged: it does not match its checksum", hint)
        del document["format"]
        files = document.pop("files")
        for name, expected in files.items():
            if not (path / name).is_file():
                raise CheckpointError(f"{path} lacks {name}", hint)
            if _measure(path / name) != expected:
                raise CheckpointError(f"{path / name} is damaged: it does not match its checksum", hint)
        return Checkpoint(path=path, **document)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} has no readable {_FILE} ({type(error).__name__})", hint) from error


def newest_complete(folder: Path) -> Checkpoint | None:
    """The checkpoint of the latest step whose files are all there and undamaged; the others are named in the log."""
    for path in reversed(_checkpoints(folder)):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("skipping a checkpoint: %s", error.message)
    return None


def rotate(folder: Path, keep: int, always: Iterable[Path]) -> None:
    """Remove all checkpoints but the ``keep`` latest and those that are ``always`` kept."""
    kept = {path.name for path in always}
    for path in _checkpoints(folder)[:-keep]:
        if path.name not in kept:
            remove_folder(path)


def discard_later(folder: Path, total_step: int) -> None:
    """Remove the checkpoints of steps after ``total_step``, the latest first: what is left is never without one."""
    for path in reversed(_checkpoints(folder)):
        if _step(path) > total_step:
            remove_folder(path)


def _checkpoints(folder: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, in the order of their steps."""
    return sorted((path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _measure(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
