"""Folders that are complete or absent: written aside, flushed, renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from monteclora.errors import CheckpointError

__all__ = ["discard_remains", "new_folder", "remove_folder"]

_STAGE = ".staged-"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into; when the block ends well it becomes ``target``, in the place of an older one.

    Raises:
        CheckpointError: the disk refuses it, for instance because it is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{_STAGE}{target.name}-"))
    except OSError as error:
        raise _refused(target, error) from error
    try:
        yield stage
        for path in (stage, *sorted(stage.rglob("*"))):
            # mkdtemp and some writers of files close them to everyone else
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
            _flush(path)
        remove_folder(target)
        os.rename(stage, target)
        _flush(target.parent)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there; killed halfway, no part of it is left under its name."""
    if path.exists():
        remains = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_STAGE}{path.name}-"))
        os.rename(path, remains / path.name)
        shutil.rmtree(remains, ignore_errors=True)


def discard_remains(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder``."""
    for path in folder.glob(f"{_STAGE}*"):
        shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows neither needs nor allows it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refused(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write {target}: {error.strerror}", "Make room, or choose another output folder.")
