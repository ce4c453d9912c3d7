from __future__ import annotations

from pathlib import Path

import pytest

from monteclora.errors import CheckpointError
from monteclora.runs.metrics_log import MetricsLog


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, event in ((1, "train"), (2, "train"), (2, "eval"), (2, "phase"), (3, "train"), (3, "finished")):
        log.append({"event": event, "step": step})
    return log


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (0, []),
        (1, [(1, "train")]),
        (2, [(1, "train"), (2, "train"), (2, "eval")]),
        (3, [(1, "train"), (2, "train"), (2, "eval"), (2, "phase"), (3, "train")]),
    ],
)
def test_rewinding_to_a_checkpoint(log: MetricsLog, step: int, kept: list[tuple[int, str]]) -> None:
    """What a phase came to at the very step is found again by the phase that ends there."""
    log.rewind(step)
    assert [(event["step"], event["event"]) for event in log.read()] == kept


def test_a_line_cut_short_by_a_kill_is_passed_over(log: MetricsLog) -> None:
    with log.path.open("a") as file:
        file.write('{"event": "tra')
    assert len(log.read()) == 6
    log.rewind(2)
    log.append({"event": "train", "step": 3})
    assert [event["step"] for event in log.read()] == [1, 2, 2, 3]


def test_other_damage_is_named(log: MetricsLog) -> None:
    lines = log.path.read_text().splitlines()
    log.path.write_text("\n".join([lines[0], "oops", *lines[1:]]) + "\n")
    with pytest.raises(CheckpointError, match="line 2 is not JSON"):
        log.read()


def test_no_file_is_no_events(tmp_path: Path) -> None:
    assert MetricsLog(tmp_path / "none").read() == []
