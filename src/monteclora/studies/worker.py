"""A worker: takes trials of a study until none is left. ``python -m monteclora.studies.worker FOLDER DEADLINE``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from monteclora.runs.kept_model import kept_base_model
from monteclora.studies.execution import attempt
from monteclora.studies.folder import StudyFolder
from monteclora.studies.plan import Plan, make_plan
from monteclora.system.randomness import preserved_generators

__all__ = ["main", "work"]

_PAUSE = 0.3  # seconds until trials of others are looked at again


def work(folder: StudyFolder, plan: Plan, deadline: float | None = None, *, linger: bool = True) -> None:
    """Take trials until each has an outcome, or the deadline (of ``time.time()``) has passed.

    Trials of one seed and model follow each other, and the pretrained model stays in memory between them.

    Args:
        folder, plan: of the study.
        deadline: no trial is taken later; None for none.
        linger: whether to wait for trials that others work on, to take them over should these die.
    """
    with kept_base_model():
        _work(folder, plan, deadline, linger)


def _work(folder: StudyFolder, plan: Plan, deadline: float | None, linger: bool) -> None:
    while True:
        left = [trials for trials in plan.runs if not all(folder.outcome_file(trial.id).is_file() for trial in trials)]
        taken = False
        for trials in left:
            if deadline is not None and time.time() > deadline:
                return
            with preserved_generators():
                taken = attempt(folder, plan.study, trials) or taken
        if not left or not (taken or linger):
            return
        if not taken:
            time.sleep(_PAUSE)


def main() -> int:
    """The process; gives its exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = StudyFolder(Path(sys.argv[1]))
    deadline = float(sys.argv[2]) if len(sys.argv) > 2 else None
    try:
        work(folder, make_plan(folder.recipe), deadline)
    except KeyboardInterrupt:
        return 130
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """Standard input ends when the process that started this one does: save, and stop."""
    while os.read(0, 1):  # sys.stdin has a lock, which a thread that waits would hold when the interpreter ends
        continue
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
