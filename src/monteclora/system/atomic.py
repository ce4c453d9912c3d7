"""Files and folders that are complete or absent: written aside, flushed, renamed.

The one place that writes anything another run, version or person reads. A file's mode is ``0666 & ~umask`` and a
folder's ``0777 & ~umask``, whichever code wrote it: temporary files, and those of some libraries, are otherwise
readable by the owner only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from monteclora.errors import CheckpointError

__all__ = ["discard_remains", "is_remains", "new_folder", "remove_folder", "replacing", "staged", "write_file"]

_STAGE = ".staged-"
_REPLACED = ".replaced-"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write a file at; when the block ends well the file is flushed and becomes ``target``.

    If the block raises, ``target`` is what it was and nothing else is left. Missing parent folders are made.

    Raises:
        CheckpointError: the folder or disk refuses it, for instance because it is full.
    """
    temporary = target.with_name(f"{_STAGE}{target.name}.{secrets.token_hex(6)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _open_to_others(temporary)
        _flush(temporary)
        temporary.replace(target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is either the old one or the whole new one.

    Raises:
        CheckpointError: the disk refuses it, for instance because it is full.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


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
            _open_to_others(path)
            _flush(path)
        _put_in_place(stage, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def staged(target: Path, *, write: bool = True) -> Iterator[Path]:
    """A folder to write into; when the block ends well its files are flushed and renamed into ``target``.

    Files of ``target`` that the block does not write stay, unlike with :func:`new_folder`. The block finds a README.md
    of ``target`` in the folder, for libraries that update a model card. The folder is made inside ``target``, which may
    be a mount point.

    Args:
        target: the folder to add to; made if it is missing.
        write: False for a process that saves nothing: what the block writes is thrown away.

    Raises:
        CheckpointError: ``target`` is a file, or the disk refuses it.
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a folder to save into", "Choose another folder.")
    existed = target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=target, prefix=_STAGE))
    except OSError as error:
        raise _refused(target, error) from error
    try:
        if (target / "README.md").exists():
            shutil.copy2(target / "README.md", stage / "README.md")
        yield stage
        if write:
            _move_files(stage, target)
    except (OSError, SafetensorError) as error:
        if target.name.startswith(_STAGE):
            raise  # inside another stage, which knows the name that the user gave
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not existed and not any(target.iterdir()):
            target.rmdir()


def _move_files(stage: Path, target: Path) -> None:
    for source in sorted(path for path in stage.rglob("*") if path.is_file()):
        _open_to_others(source)
        _flush(source)
        destination = target / source.relative_to(stage)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, destination)


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


def is_remains(name: str) -> bool:
    """Whether a name is that of a file or folder being written, or left half-written by a killed process."""
    return name.startswith((_STAGE, _REPLACED))


def discard_remains(folder: Path, files: Container[str] = ()) -> None:
    """Remove what a killed process left half-written in ``folder``, and restore what it was about to replace.

    Args:
        folder: in which no other process makes folders now.
        files: names of those that no other process writes now; others may be half-written because they are being so.
    """
    for aside in folder.glob(f"{_REPLACED}*"):
        for older in aside.iterdir():
            if not (folder / older.name).exists():
                os.rename(older, folder / older.name)
        shutil.rmtree(aside, ignore_errors=True)
    for path in folder.glob(f"{_STAGE}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.removeprefix(_STAGE).rpartition(".")[0] in files:
            path.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0o022)  # the only way to read it is to set it
    os.umask(current)
    return current


def _open_to_others(path: Path) -> None:
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


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
