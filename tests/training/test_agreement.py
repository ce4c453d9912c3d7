"""What the main process alone does ends all of them alike."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from monteclora.errors import CheckpointError
from monteclora.training.agreement import by_main_process
from tests.training.processes import environments

WORKER = """
import json
from accelerate import PartialState
from monteclora.errors import CheckpointError
from monteclora.training.agreement import by_main_process
state, calls, ends = PartialState(cpu=True), [], []
def action(error):
    calls.append(error)
    if error is not None:
        raise error
class Closed(OSError):
    def __reduce__(self):
        raise TypeError("it holds what cannot be sent")
for error in (None, CheckpointError("no room", "Make room."), Closed(28, "No space left"), None):
    try:
        by_main_process(lambda: action(error))
        ends.append("done")
    except Exception as found:
        ends.append(f"{type(found).__name__}: {found}")
state.destroy_process_group()
print(json.dumps([len(calls), ends]))
"""


def test_two_processes_end_with_the_same_error_and_go_on_together() -> None:
    command = [sys.executable, "-c", WORKER]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in environments(2)]
    (calls, main), (others_calls, other) = (json.loads(each.communicate(timeout=120)[0]) for each in started)
    assert (calls, others_calls) == (4, 0)
    assert main == ["done", "CheckpointError: no room. Make room.", "Closed: [Errno 28] No space left", "done"]
    told = "MonteCLoRAError: the main process failed (Closed: [Errno 28] No space left). See what it says."
    assert other == [*main[:2], told, "done"]


def test_one_process_raises_what_was_raised() -> None:
    error = CheckpointError("no room")

    def fail() -> None:
        raise error

    with pytest.raises(CheckpointError) as found:
        by_main_process(fail)
    assert found.value is error
