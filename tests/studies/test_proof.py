"""Whatever is killed, and whenever: one result a cell, equal to the serial study's to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monteclora.studies.folder import StudyFolder
from monteclora.studies.plan import make_plan
from monteclora.studies.recipe import load_study
from monteclora.studies.study import study
from tests.studies.test_study import drive, holders, results

Make = Callable[..., dict[str, Any]]
GRID = {
    "method.name": ["lora", "monteclora"],
    "training.learning_rate": [1e-3, 3e-3, 1e-2, 3e-2],
    "training.batch_size": [8, 16],
    "seed": [0, 1, 2],
}
WORKERS, KILLS_OF_EACH, KILLS_OF_DRIVER = 2, 10, 5


@pytest.mark.slow
def test_48_cells_survive_10_kills_of_each_worker_and_5_of_the_driver(make_study: Make, tmp_path: Path) -> None:
    recipe = make_study("killed", GRID)
    folder = StudyFolder(Path(recipe["output"]))
    trials = make_plan(load_study(recipe)).trials
    assert len(trials) == 48
    generator = random.Random(0)
    kills = [signal.SIGKILL] * (WORKERS * KILLS_OF_EACH + KILLS_OF_DRIVER)
    of_driver = set(generator.sample(range(len(kills)), KILLS_OF_DRIVER))
    killed: set[int] = set()
    driver = drive(recipe, tmp_path)
    end = time.monotonic() + 5400  # not an expectation: a study that never ends is to fail
    try:
        while driver.poll() is None or driver.returncode != 0:
            if driver.poll() is not None:
                driver = drive(recipe, tmp_path)
            assert time.monotonic() < end
            time.sleep(generator.uniform(0.05, 0.5))
            working = sorted(set(holders(folder)) - killed)
            if len(killed) < len(kills) and working:
                victim = driver.pid if len(killed) in of_driver else generator.choice(working)
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed.add(victim)
                if victim == driver.pid:
                    driver.wait()
    finally:
        driver.kill()
    assert len(killed) == len(kills), "the study was done before every kill: make the pauses shorter"
    assert sorted(path.stem for path in (folder.path / "results").iterdir()) == sorted(trial.id for trial in trials)
    serial = study(make_study("serial", GRID), workers=0, progress=False)
    assert results(study(recipe, workers=0, progress=False)) == results(serial)


def test_ctrl_c_leaves_everything_to_be_resumed(make_study: Make, tmp_path: Path) -> None:
    """As a terminal sends it: to every process of the command's group, of which the workers are not."""
    grid = {"method.name": ["monteclora"], "seed": [0, 1]}
    recipe = make_study("interrupted", grid, set={"training.epochs": 20, "training.save_every": None})
    file = tmp_path / "interrupted.json"  # JSON is YAML
    file.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "monteclora", "study", str(file), "--workers", "1"]
    folder = StudyFolder(Path(recipe["output"]))
    with (tmp_path / "said").open("wb") as said:
        driver = subprocess.Popen(
            command,
            stdout=said,
            stderr=said,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
        )
    end = time.monotonic() + 300  # not an expectation
    try:
        while not any(path.stat().st_size for path in folder.path.glob("trials/*/metrics.jsonl")):
            assert driver.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < end
            time.sleep(0.01)
        (worker,) = set(holders(folder))
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.wait(200) == 130
    finally:
        driver.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert holders(folder) == []
    assert list(folder.path.glob("trials/*/checkpoints/checkpoint-*"))
    assert len(folder.outcomes(make_plan(load_study(recipe)).trials)) < 2
    found = study(recipe, workers=0, progress=False)
    resumed = [json.loads(path.read_text()) for path in folder.path.glob("trials/*/environment.json")]
    assert any("resumed" in environment for environment in resumed)
    alone = {"training.epochs": 20, "training.save_every": None}
    assert results(found) == results(study(make_study("serial", grid, set=alone), workers=0, progress=False))
