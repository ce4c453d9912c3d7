"""Who works on which trial: claims with a lease, in files that processes on several machines share.

A claim lives as long as its file is touched. On the machine of its holder it ends at once when the holder's process
does. All decisions are made under one lock of the folder, which the operating system frees when its holder dies, so
that no two processes take one trial.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from monteclora.system.atomic import write_file

__all__ = ["Claims", "TrialState"]

LEASE = 60.0  # seconds without a heartbeat after which a claim of another machine counts as abandoned


@dataclass
class TrialState:
    """What is known of a trial that has no result yet.

    Attributes:
        holder: token, host and process of who works on it; None for nobody.
        failures: why it failed so far, a reason each.
        deaths: how often in a row its holder died without coming further.
        step: of its newest checkpoint when it was last taken.
        micro_batch_size: rows of a pass that fitted into memory; None for the recipe's.
        eval_batch_size: likewise, of evaluation.
    """

    holder: dict[str, Any] | None = None
    failures: list[str] = field(default_factory=list)
    deaths: int = 0
    step: int = 0
    micro_batch_size: int | None = None
    eval_batch_size: int | None = None


class Claims:
    """The claims of a study folder.

    Args:
        folder: of the claims.
        lease: seconds.
    """

    def __init__(self, folder: Path, lease: float = LEASE) -> None:
        self._folder = folder
        self._lease = lease
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / ".lock")

    def take(self, trial: str, done: Callable[[], bool], step: Callable[[], int]) -> tuple[str, TrialState] | None:
        """Claim a trial: the token of the claim and its state, or None where somebody has it or it is done.

        Args:
            trial: its id.
            done: whether it has a result, asked under the lock.
            step: of its newest checkpoint.
        """
        with self._lock:
            if done():
                return None
            state = self.state(trial)
            if state.holder is not None:
                if self._is_alive(trial, state.holder):
                    return None
                reached = step()
                state.deaths = state.deaths + 1 if reached == state.step else 1
                state.step = reached
            token = secrets.token_hex(8)
            state.holder = {
                "token": token,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "start": _start(os.getpid()),
            }
            self._write(trial, state)
            return token, state

    def release(self, trial: str, token: str, state: TrialState) -> bool:
        """Give a claim back with what is known now; False where it was lost meanwhile."""
        with self.held(trial, token) as mine:
            if mine:
                state.holder = None
                self._write(trial, state)
            return mine

    @contextmanager
    def held(self, trial: str, token: str) -> Iterator[bool]:
        """Whether the claim is still one's own; it stays so inside the block."""
        with self._lock:
            holder = self.state(trial).holder
            yield holder is not None and holder["token"] == token

    @contextmanager
    def heartbeat(self, trial: str) -> Iterator[None]:
        """Keeps the claim alive inside the block, from a thread."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self._lease / 4):
                try:
                    os.utime(self._file(trial))
                except OSError:
                    continue  # a shared folder that is out of reach for a moment

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def state(self, trial: str) -> TrialState:
        """What is known of a trial."""
        try:
            return TrialState(**json.loads(self._file(trial).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return TrialState()

    def running(self, trial: str) -> bool:
        """Whether somebody works on it."""
        holder = self.state(trial).holder
        return holder is not None and self._is_alive(trial, holder)

    def _is_alive(self, trial: str, holder: dict[str, Any]) -> bool:
        if holder["host"] == socket.gethostname():
            return _start(holder["pid"]) == holder["start"] is not None
        return self._now() - self._file(trial).stat().st_mtime < self._lease

    def _now(self) -> float:
        """The time of whoever serves the folder, which heartbeats are written in."""
        probe = self._folder / f".now-{os.getpid()}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now

    def _file(self, trial: str) -> Path:
        return self._folder / f"{trial}.json"

    def _write(self, trial: str, state: TrialState) -> None:
        write_file(self._file(trial), json.dumps(asdict(state)).encode())


def _start(pid: int) -> float | None:
    """When a process of this machine started, so that a later one of the same number is not taken for it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError, ValueError):
        return None
    try:
        os.kill(pid, 0)  # no /proc: only whether there is one
    except OSError:
        return None
    return 0.0
