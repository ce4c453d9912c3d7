"""Worker processes on this machine: started, watched, replaced when they die, and asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from monteclora.errors import ConfigError
from monteclora.studies.folder import StudyFolder
from monteclora.system.devices import usable_cores

__all__ = [
    "PATIENCE",
    "POLL",
    "Endings",
    "default_workers",
    "last_line",
    "run_workers",
    "threads_of_a_worker",
    "worker_command",
]

POLL = 0.25  # seconds
_MOST_FAILURES = 5  # of workers in a row without a new result
_MOST_KILLED = 30  # likewise, a worker: more than a trial that kills its workers takes to count as failed
PATIENCE = 120.0  # seconds for interrupted workers to save


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    log: Path


class Endings:
    """Counts how workers end, and gives the study up where they come to nothing.

    Args:
        folder: of the study.
        count: how many workers there are.
        done: how many trials are done.
    """

    def __init__(self, folder: StudyFolder, count: int, done: int) -> None:
        self._folder, self._count, self._done = folder, count, done
        self._failures = self._killed = 0

    def now(self, done: int) -> None:
        """Told how many trials are done: where there is a new one, earlier ends do not count any more."""
        if done > self._done:
            self._failures, self._killed, self._done = 0, 0, done

    def add(self, status: int, said: str) -> None:
        """Told of a worker that ended with a status other than 0; one that a signal ended has a negative one.

        Raises:
            ConfigError: there were too many in a row; the message has the last that this one said.
        """
        self._failures += status > 0
        self._killed += status < 0  # by a signal, which may have nothing to do with what it worked on
        if self._failures >= _MOST_FAILURES or self._killed >= _MOST_KILLED * self._count:
            how = "fail" if status > 0 else f"are ended by signal {-status}"
            raise ConfigError(f"workers of {self._folder.path} {how}: {said}", f"See {self._folder.path / 'logs'}.")


def default_workers(per_device: int) -> int:
    """One for each core, or ``per_device`` for each GPU."""
    if torch.cuda.is_available():
        return per_device * torch.cuda.device_count()
    return usable_cores()


def run_workers(
    folder: StudyFolder, count: int, per_device: int, deadline: float | None, tick: Callable[[], int]
) -> None:
    """Have worker processes run a study until they find nothing left to do.

    Args:
        folder: of the study, with its recipe.
        count: how many workers.
        per_device: how many share a GPU.
        deadline: of ``time.time()``, after which no trial is started; None for none.
        tick: called again and again, to show how far the study is; gives how many trials are done.

    Raises:
        ConfigError: workers end with an error before they finish a trial; the message has its last line.
        KeyboardInterrupt: asked for; the workers have saved.
    """
    workers = [_start(folder, number, per_device, deadline) for number in range(count)]
    endings = Endings(folder, count, tick())
    try:
        while workers:
            time.sleep(POLL)
            endings.now(tick())
            for number, worker in enumerate(list(workers)):
                status = worker.process.poll()
                if status is None:
                    continue
                worker.process.communicate()  # nothing more, but it closes the pipe
                if status == 0:
                    workers.remove(worker)
                    continue
                endings.add(status, last_line(worker.log))
                workers[workers.index(worker)] = _start(folder, number, per_device, deadline)
    finally:
        _stop(workers)


def _start(folder: StudyFolder, number: int, per_device: int, deadline: float | None) -> _Worker:
    log = folder.path / "logs" / f"worker-{os.getpid()}-{number}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            worker_command(sys.executable, folder.path, deadline),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**os.environ, **_environment(number, per_device)},
            start_new_session=True,  # Ctrl-C goes to this process alone, which then asks the workers to stop
        )
    return _Worker(process, log)


def worker_command(python: str, folder: Path, deadline: float | None) -> list[str]:
    """Starts a worker of a study's folder, see :mod:`monteclora.studies.worker`."""
    command = [python, "-m", "monteclora.studies.worker", str(folder)]
    return command if deadline is None else [*command, str(deadline)]


def threads_of_a_worker() -> dict[str, str]:
    """The environment in which a worker has one thread, whatever their number, so that results do not depend on it."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}


def _environment(number: int, per_device: int) -> Mapping[str, str]:
    """One thread each, and a GPU."""
    threads = threads_of_a_worker()
    if not torch.cuda.is_available():
        return threads
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return {**threads, "CUDA_VISIBLE_DEVICES": names[number // per_device % len(names)]}


def _stop(workers: list[_Worker]) -> None:
    """Have them save and end; a second interruption ends them at once."""
    running = [worker.process for worker in workers if worker.process.poll() is None]
    try:
        for process in running:
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        for process in running:
            process.wait(max(end - time.monotonic(), 0.1))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in running:
            process.kill()
            process.wait()


def last_line(log: Path) -> str:
    """What a worker said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"
