from __future__ import annotations

import os
from pathlib import Path

import pytest

from monteclora.errors import CheckpointError
from monteclora.training.folders import discard_remains, new_folder, remove_folder


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
