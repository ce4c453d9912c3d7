from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monteclora.errors import ConfigError
from monteclora.studies import processes
from monteclora.studies.folder import StudyFolder


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
