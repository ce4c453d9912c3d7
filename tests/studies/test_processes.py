from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from monteclora.errors import ConfigError
from monteclora.studies import processes, ray_cluster
from monteclora.studies.folder import Outcome, StudyFolder
from monteclora.studies.plan import Trial, make_plan
from monteclora.studies.recipe import load_study
from monteclora.studies.study import study

study_module = sys.modules["monteclora.studies.study"]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[int]]:
    """Has programs started in place of workers; gives their number, which grows."""

    def use(code: str) -> list[int]:
        numbers: list[int] = []

        def start(folder: StudyFolder, number: int, *_: Any) -> Any:
            numbers.append(number)
            log = folder.path / "worker.log"
            with log.open("ab") as output:
                return processes._Worker(subprocess.Popen([sys.executable, "-Sc", code], stdout=output), log)

        monkeypatch.setattr(processes, "_start", start)
        monkeypatch.setattr(processes, "POLL", 0.01)
        return numbers

    return use


def test_workers_that_are_killed_before_any_trial_are_not_started_for_ever(
    tmp_path: Path, started: Callable[[str], list[int]]
) -> None:
    numbers = started("import os; print('killed', flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(ConfigError, match="are ended by signal 9: killed"):
        processes.run_workers(StudyFolder(tmp_path), 1, 1, None, lambda: 0)
    assert len(numbers) == processes._MOST_KILLED


def test_killed_workers_are_replaced_while_results_come(tmp_path: Path, started: Callable[[str], list[int]]) -> None:
    rest = 40
    numbers = started("import os; os.kill(os.getpid(), 9)")

    def tick() -> int:
        if len(numbers) >= rest:
            started("pass")
        return len(numbers) // 5

    processes.run_workers(StudyFolder(tmp_path), 1, 1, None, tick)
    assert len(numbers) >= rest > processes._MOST_KILLED


def test_workers_that_fail_end_the_study_with_their_reason(tmp_path: Path, started: Callable[[str], list[int]]) -> None:
    numbers = started("print('no such module', flush=True); exit(1)")
    with pytest.raises(ConfigError, match="fail: no such module"):
        processes.run_workers(StudyFolder(tmp_path), 1, 1, None, lambda: 0)
    assert len(numbers) == processes._MOST_FAILURES


def test_no_more_workers_are_started_than_runs_are_left(
    make_study: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_study(grid={"method.name": ["monteclora"], "seed": [0, 1, 2], "evaluation.num_samples": [2, 3]})
    plan = make_plan(load_study(recipe))
    folder = StudyFolder(plan.study.folder)

    def done(trials: Sequence[Trial]) -> None:
        for trial in trials:
            folder.write_outcome(Outcome(trial.id, "finished", metrics={"accuracy": 0.5}))

    started: list[tuple[str, int]] = []
    monkeypatch.setattr(study_module, "run_workers", lambda _, count, *rest: started.append(("here", count)))
    monkeypatch.setattr(study_module, "run_on_ray", lambda *given: started.append(("ray", given[3])))
    monkeypatch.setattr(study_module, "work", lambda *_: started.append(("in this process", 0)))
    first, second, third = plan.runs
    done([*first, second[0]])
    study(recipe, workers=8, progress=False)
    study(recipe, workers=1, progress=False)
    study(recipe, ray="local", progress=False)
    assert started == [("here", 2), ("here", 1), ("ray", 2)]
    started.clear()
    done([second[1], *third])
    for workers, ray in ((8, None), (None, "local"), (0, None)):
        assert study(recipe, workers=workers, ray=ray, progress=False).left == 0
    assert started == []


@pytest.mark.parametrize(("count", "most", "tasks"), [(None, 2, 2), (3, 2, 2), (1, 2, 1), (None, 9, 4)])
def test_a_cluster_gets_no_more_workers_than_have_something_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int | None, most: int, tasks: int
) -> None:
    asked: list[int] = []

    def start(path: str, number: int, deadline: float | None) -> int:
        asked.append(number)
        return number

    cluster = SimpleNamespace(
        cluster_resources=lambda: {"CPU": 4.0},
        remote=lambda **_: lambda function: SimpleNamespace(remote=start),
        wait=lambda running, **_: (running, []),
        get=lambda task: (0, ""),
    )
    monkeypatch.setattr(ray_cluster, "_connected", lambda address: nullcontext(cluster))
    ray_cluster.run_on_ray(StudyFolder(tmp_path), "local", count, most, 1, None, lambda: 0)
    assert asked == list(range(tasks))
