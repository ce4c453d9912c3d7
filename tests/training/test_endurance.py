"""Runs that are killed again and again, or go on for long, end as those that were not; whatever the machine does."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from monteclora.runs.manifest import newest_complete
from monteclora.runs.run_folder import RunFolder
from monteclora.training.interruption import TrainingInterrupted
from monteclora.training.loop import Loop
from monteclora.training.run import train
from tests.training.conftest import Recipe, quietly
from tests.training.test_checkpoint import assert_same

MakeRecipe = Callable[..., Recipe]
SAVE_EVERY = 2
WATCHED = {"save_every": SAVE_EVERY, "keep_checkpoints": 2, "logging_every": 1}
KINDS: list[dict[str, Any]] = [
    {"kind": "classification", "best_metric": "nll", **WATCHED},
    {"kind": "causal_lm", "micro_batch_size": 4, **WATCHED},
    {"kind": "classification", "mode": "post_hoc", "max_steps": 5, "post_hoc": {"max_steps": 5}, **WATCHED},
]


def start(recipe: Recipe, prepare: Callable[[], None] | None = None) -> BaseProcess:
    """Train in a forked process: importing everything again takes longer than the run."""

    def work() -> None:
        if prepare is not None:
            prepare()
        try:
            train(recipe, progress=False)
        except TrainingInterrupted:
            os._exit(130)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


class DieAtCall:
    """Kills the process at its n-th call of what makes files last: while it saves more often than not."""

    PLACES = ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (shutil, "rmtree"))

    def __init__(self, number: float) -> None:
        self.left = number
        self.calls = 0

    def __call__(self) -> None:
        for module, name in self.PLACES:
            setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls > self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call


def count_calls(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[int, float]:
    """Train uninterrupted; gives the number of such calls, and seconds."""
    counter = DieAtCall(float("inf"))
    started = time.monotonic()
    with monkeypatch.context() as patch:
        for module, name in counter.PLACES:
            patch.setattr(module, name, counter.counted(getattr(module, name)))
        quietly(recipe)
    return counter.calls, time.monotonic() - started


def lost_steps(folder: Path) -> int:
    """How many measured steps are not in a complete checkpoint."""
    run = RunFolder(folder)
    measured = max((event["step"] for event in run.metrics.read()), default=0)
    found = newest_complete(run.checkpoints)
    return measured - (found.total_step if found else 0)


def test_killed_before_its_recipe_is_written(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Nothing but a half-written file is there: still the folder of this run, and the file goes."""
    made = recipe(max_steps=2)
    process = start(made, DieAtCall(0))
    process.join()
    run = tmp_path / "run"
    assert process.exitcode == -signal.SIGKILL
    assert not (run / "recipe.yaml").exists()
    left = [path for path in run.iterdir() if path.name != ".lock"]
    assert len(left) == 1
    (run / ".staged-predictions.parquet.0123456789ab").touch()  # another process's, which evaluates
    assert quietly(made).steps == 2
    assert [path.name for path in run.glob(".staged-*")] == [".staged-predictions.parquet.0123456789ab"]


@pytest.mark.parametrize(
    "kills", [pytest.param(25, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.nightly)]
)
def test_killed_at_random_points(
    kills: int, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Half of the kills come at a random time, half at a random call that writes, several in one run."""
    generator = random.Random(0)
    costs = [count_calls(recipe(name=f"whole{n}", **kind), monkeypatch) for n, kind in enumerate(KINDS)]
    killed = runs = 0
    while killed < kills:
        kind, (calls, seconds) = runs % len(KINDS), costs[runs % len(KINDS)]
        made = recipe(name="parts", **KINDS[kind])
        for _ in range(min(generator.randint(1, 9), kills - killed)):
            if generator.random() < 0.5:
                process = start(made, DieAtCall(generator.randrange(calls)))
                process.join()
            else:
                process = start(made)
                process.join(generator.uniform(0, seconds))
                process.kill()
                process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            if process.exitcode == 0:
                break
            killed += 1
            assert lost_steps(tmp_path / "parts") <= SAVE_EVERY
        quietly(made)
        assert_same(tmp_path / f"whole{kind}", tmp_path / "parts")
        assert not list((tmp_path / "parts").rglob(".staged-*")) + list((tmp_path / "parts").rglob(".replaced-*"))
        shutil.rmtree(tmp_path / "parts")
        runs += 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_saved_within_five_seconds_of_a_signal(number: signal.Signals, recipe: MakeRecipe, tmp_path: Path) -> None:
    """In the middle of training and of a long evaluation; a step of this model takes milliseconds."""
    made = recipe(epochs=400, save_every=10_000, eval_every=3, eval_batch_size=1, logging_every=1)
    run = RunFolder(tmp_path / "run")
    for _ in range(2):
        before = len(run.metrics.read())
        process = start(made)
        while len(run.metrics.read()) < before + 5:
            assert process.exitcode is None
            time.sleep(0.01)
        os.kill(process.pid or 0, number)
        process.join(5)
        assert process.exitcode == 130
        assert newest_complete(run.checkpoints) is not None


class _Watch:
    """Memory and open files at every hundredth step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.step = Loop.step

    def __call__(self, loop: Loop, batches: Any) -> None:
        if loop.state.step and loop.state.step % 100 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
        self.step(loop, batches)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured by way of /proc")
def test_two_thousand_steps_take_no_more_memory_than_two_hundred(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe(max_steps=2010, epochs=1000, batch_size=4, save_every=100, eval_every=100, keep_checkpoints=2)
    watch, file = _Watch(), tmp_path / "seen.json"

    def work() -> None:
        Loop.step = lambda loop, batches: watch(loop, batches)  # type: ignore[method-assign]
        train(made, progress=False)
        file.write_text(json.dumps(watch.seen))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    memory, files = zip(*json.loads(file.read_text()), strict=True)
    assert len(memory) == 20
    assert memory[-1] - memory[1] < 20e6, [round(size / 1e6, 1) for size in memory]
    assert len(set(files)) == 1, files


@pytest.mark.nightly
def test_killed_every_twenty_seconds_for_half_an_hour(recipe: MakeRecipe, tmp_path: Path) -> None:
    """``MONTECLORA_SOAK_SECONDS`` shortens or lengthens it."""
    length = float(os.environ.get("MONTECLORA_SOAK_SECONDS", "1800"))
    options = {"max_steps": 4000, "epochs": 1000, "save_every": 50, "eval_every": 200, "keep_checkpoints": 2}
    quietly(recipe(name="whole", **options))
    parts = recipe(name="parts", **options)
    end, kills = time.monotonic() + length, 0
    while time.monotonic() < end:
        while True:
            process = start(parts)
            process.join(20)
            if process.exitcode == 0:
                break
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            assert lost_steps(tmp_path / "parts") <= 50
        assert_same(tmp_path / "whole", tmp_path / "parts")
        shutil.rmtree(tmp_path / "parts")
    assert kills >= length / 60
