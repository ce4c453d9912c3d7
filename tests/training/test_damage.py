"""What happens to files: damage is found, and what cannot be written leaves what was there."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from monteclora.cli import main
from monteclora.config import dump
from monteclora.errors import CheckpointError
from monteclora.runs.manifest import newest_complete, read_checkpoint
from monteclora.runs.recipe import load_recipe
from monteclora.system import atomic
from tests.training.conftest import Recipe, StopAfter, adapter_content, quietly, train_until

MakeRecipe = Callable[..., Recipe]
CUTS, FLIPS = 10, 50


@pytest.fixture
def stopped(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The checkpoints of a run that was stopped at step 4: those of steps 2 and 4."""
    train_until(monkeypatch, StopAfter(4), recipe(save_every=2))
    return tmp_path / "run/checkpoints"


# -- damage ----------------------------------------------------------------------------------------------------------


def damages(content: bytes, generator: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """A file deleted, cut at ten places, and with one of fifty bits flipped."""
    yield "deleted", None
    for number in range(CUTS):
        length = number * len(content) // CUTS
        yield f"cut to {length} bytes", content[:length]
    for bit in generator.sample(range(8 * len(content)), min(FLIPS, 8 * len(content))):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", bytes(flipped)


def test_every_damage_to_every_file_is_found(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    generator = random.Random(0)
    latest = stopped / "checkpoint-4"
    files = sorted(path for path in latest.rglob("*") if path.is_file())
    assert {"manifest.json", "adapter_model.safetensors", "posterior.safetensors", "training_state.json"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        for what, damaged in damages(content, generator):
            caplog.clear()
            path.unlink() if damaged is None else path.write_bytes(damaged)
            found = newest_complete(stopped)
            assert found is not None
            assert found.step == 2, f"{path.name}, {what}, was taken for complete"
            assert "checkpoint-4" in caplog.text
            path.write_bytes(content)
    assert newest_complete(stopped) == read_checkpoint(latest)


def test_every_bit_of_the_manifest_counts(stopped: Path) -> None:
    path = stopped / "checkpoint-4/manifest.json"
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            read_checkpoint(path.parent)


@pytest.mark.parametrize("name", ["manifest.json", "adapter_model.safetensors", "training_state.json"])
def test_the_run_goes_on_from_the_older_checkpoint(
    name: str, recipe: MakeRecipe, stopped: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    quietly(recipe(name="whole", save_every=2))
    with (stopped / "checkpoint-4" / name).open("r+b") as file:
        file.truncate(100)
    quietly(recipe(save_every=2))
    assert "skipping a checkpoint" in caplog.text
    assert "checkpoint-4" in caplog.text
    assert adapter_content(tmp_path / "whole") == adapter_content(tmp_path / "run")


def test_a_manifest_of_before_it_had_a_checksum(stopped: Path) -> None:
    path = stopped / "checkpoint-4/manifest.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    path.write_text(json.dumps(document))
    assert read_checkpoint(path.parent).step == 4


# -- a disk that is full ---------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume_with_small_files(recipe_file: Path, most: int, told: Path) -> int:
    """The exit status of ``monteclora train`` where no file may be larger than ``most`` bytes."""

    def work() -> None:
        sys.stderr = told.open("w", buffering=1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # write() then fails with EFBIG, as it does with ENOSPC
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        os._exit(main(["train", str(recipe_file)]))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode or 0


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "training_state.safetensors"])
def test_no_room_for_a_checkpoint(name: str, recipe: MakeRecipe, stopped: Path, tmp_path: Path) -> None:
    most = (stopped / "checkpoint-4" / name).stat().st_size - 1
    before = snapshot(stopped)
    recipe_file, told = tmp_path / "recipe.yaml", tmp_path / "stderr"
    recipe_file.write_text(dump(load_recipe(recipe(save_every=2))))
    assert resume_with_small_files(recipe_file, most, told) == 2
    error = told.read_text().splitlines()[-1]
    assert error.startswith(f"error: cannot write {stopped / 'checkpoint-6'}: ")
    assert "Make room" in error
    assert "File too large" in error
    assert snapshot(stopped) == before
    assert {path.name for path in stopped.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    quietly(recipe(save_every=2))
    quietly(recipe(name="whole", save_every=2))
    assert adapter_content(tmp_path / "whole") == adapter_content(tmp_path / "run")


@pytest.mark.parametrize("where", ["flush", "rename", "save_tree", "file"])
def test_no_space_left(where: str, recipe: MakeRecipe, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = snapshot(stopped)
    place = {
        "flush": "monteclora.system.atomic._flush",
        "rename": "monteclora.system.atomic.os.rename",
        "save_tree": "monteclora.training.checkpoint.save_tree",
        "file": "monteclora.system.atomic.os.fsync",
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(CheckpointError, match="No space left on device") as error:
            quietly(recipe(save_every=2))
    assert "\n" not in str(error.value)
    assert "Make room" in error.value.hint
    assert snapshot(stopped) == before
    assert not list(stopped.glob(f"{atomic._STAGE}*"))
    assert quietly(recipe(save_every=2)).steps == 10


class _Replacing:
    """Writes a checkpoint again, as after an evaluation that was cut short; ``act`` takes the place of the rename."""

    def __init__(self, target: Path, act: Callable[[], None]) -> None:
        self.target = target
        self.act = act
        self.rename = os.rename

    def __call__(self, source: Path, destination: Path) -> None:
        if destination == self.target and source.name.startswith(atomic._STAGE):
            self.act()
        self.rename(source, destination)

    def write(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("monteclora.system.atomic.os.rename", self)
        with atomic.new_folder(self.target) as stage:
            (stage / "new").write_text("new")


def test_what_is_replaced_stays_until_it_is(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    before = snapshot(stopped)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        _Replacing(stopped / "checkpoint-4", refuse).write(patch)
    assert snapshot(stopped) == before
    work = partial(_Replacing(stopped / "checkpoint-4", kill).write, monkeypatch)
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (stopped / "checkpoint-4").exists()
    atomic.discard_remains(stopped)
    assert snapshot(stopped) == before
    assert {path.name for path in stopped.iterdir()} == {"checkpoint-2", "checkpoint-4"}
