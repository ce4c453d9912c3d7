from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from monteclora.errors import CheckpointError
from monteclora.system.atomic import discard_remains, new_folder, remove_folder, staged, write_file


def test_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep/run"

    def fail_halfway() -> None:
        with new_folder(target) as stage:
            (stage / "half").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert not target.exists()
    assert not list(target.parent.iterdir())
    with new_folder(target) as stage:
        (stage / "one").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["one"]


def test_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with new_folder(tmp_path / "run") as stage:
            (stage / name).write_text(name)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_readable_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "run") as stage:
            (stage / "file").write_text("1")
            (stage / "file").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "run/file").stat().st_mode & 0o777 == 0o640


def test_what_the_disk_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"), new_folder(tmp_path / "file/run"):
        pass


def test_remains_of_a_killed_process(tmp_path: Path) -> None:
    (tmp_path / ".staged-run-abc/inner").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    discard_remains(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    remove_folder(tmp_path / "run")
    remove_folder(tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_and_folders_have_the_mode_that_the_umask_leaves_them(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "file", b"one")
        with new_folder(tmp_path / "folder") as stage:
            (stage / "inside").touch(0o600)
        with staged(tmp_path / "added") as stage:
            (stage / "inside").touch(0o600)
    finally:
        os.umask(before)
    files = [tmp_path / "file", tmp_path / "folder/inside", tmp_path / "added/inside"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("folder", "added")} == {0o777 & ~umask}


def test_a_file_whose_writing_is_interrupted_is_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupted

    path = tmp_path / "file"
    write_file(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(Interrupted):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_staging_happens_inside_the_target_which_may_be_a_mount_point(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with staged(tmp_path) as stage:
        assert stage.parent == tmp_path
        (stage / "sub").mkdir()
        (stage / "sub/new").write_text("ours")
    assert (tmp_path / "kept").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "sub"]


def test_a_refused_addition_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()
