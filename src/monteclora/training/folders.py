"""Folders and files that are complete or absent: written aside, flushed, renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from monteclora.adapters.storage import write_bytes
from monteclora.errors import CheckpointError

__all__ = ["discard_remains", "new_folder", "remove_folder", "write_file"]

_STAGE = ".staged-"
_REPLACED = ".replaced-"


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
        _put_in_place(stage, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _put_in_place(stage: Path, target: Path) -> None:
    """Rename; an older folder stays within reach until the new one has its name."""
    if not target.exists():
        os.rename(stage, target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{_REPLACED}{target.name}-"))
    older = aside / target.name
    os.rename(target, older)
    try:
        os.rename(stage, target)
    except OSError:
        os.rename(older, target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there; killed halfway, no part of it is left under its name."""
    if path.exists():
        remains = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_STAGE}{path.name}-"))
        os.rename(path, remains / path.name)
        shutil.rmtree(remains, ignore_errors=True)


def discard_remains(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder``, and put back what it was about to replace."""
    for aside in folder.glob(f"{_REPLACED}*"):
        for older in aside.iterdir():
            if not (folder / older.name).exists():
                os.rename(older, folder / older.name)
        shutil.rmtree(aside, ignore_errors=True)
    for path in folder.glob(f"{_STAGE}*"):
        shutil.rmtree(path, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is either the old one or the whole new one.

    Raises:
        CheckpointError: the disk refuses it, for instance because it is full.
    """
    try:
        write_bytes(path, content)
    except OSError as error:
        raise _refused(path, error) from error


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


def _refused(target: Path, error: OSError | SafetensorError) -> CheckpointError:
    # safetensors writes by itself, and has an error of its own for what the system refuses
    reason = error.strerror if isinstance(error, OSError) else error
    return CheckpointError(f"cannot write {target}: {reason}", "Make room, or choose another output folder.")
