"""Who works on which trial: claims with a lease, in files that processes on several machines share.

Trials that are evaluations of one run are claimed together, by the run's id, which is that of the trial where there is
one: no two processes train a run, or write to its folder, at once.

A claim lives as long as its file is touched. Where the holder's process can be seen it ends at once when that does: on
the same machine, since it was started, and among the same processes, which those of another container are not. All
decisions are made under one lock of the folder, which the operating system frees when its holder dies, so
that no two processes take one trial.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from monteclora.errors import CheckpointError
from monteclora.system.atomic import write_file

__all__ = ["Claims", "TrialState"]

LEASE = 60.0  # seconds without a heartbeat after which a claim of another machine counts as abandoned


@dataclass
class TrialState:
    """What is known of a trial that has no result yet.

    Attributes:
        holder: token, machine and process of who works on it; None for nobody.
        failures: why it failed so far, a reason each.
        deaths: how often in a row its holder died without coming further.
        step: of its newest checkpoint when it was last taken.
        micro_batch_size: rows of a pass of training that are to fit into memory; None for the recipe's.
        eval_batch_size: likewise, of the evaluations during training.
        score_batch_size: likewise, of the evaluation of the trained run; None for what it was trained with.
    """

    holder: dict[str, Any] | None = None
    failures: list[str] = field(default_factory=list)
    deaths: int = 0
    step: int = 0
    micro_batch_size: int | None = None
    eval_batch_size: int | None = None
    score_batch_size: int | None = None


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
                "machine": _machine(),
                "pid": os.getpid(),
                "start": _start(os.getpid()),
            }
            self._write(trial, state)
            return token, state

    def forget(self, trial: str, results: Iterable[Path]) -> None:
        """Remove results and the failures that led to them, so that they are tried again, unless in progress."""
        with self.idle(trial) as idle:
            if idle:
                self._write(trial, replace(self.state(trial), holder=None, failures=[], deaths=0))
                for result in results:
                    result.unlink(missing_ok=True)

    @contextmanager
    def idle(self, trial: str) -> Iterator[bool]:
        """Whether nobody works on a trial; nobody takes it inside the block."""
        with self._lock:
            holder = self.state(trial).holder
            yield holder is None or not self._is_alive(trial, holder)

    def release(self, trial: str, token: str, state: TrialState) -> bool:
        """Give a claim back with what is known now; False if it was lost in the meantime."""
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
    def heartbeat(self, trial: str, token: str) -> Iterator[None]:
        """Keeps the claim alive inside the block, from a thread, for as long as it is one's own."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self._lease / 4):
                try:
                    with self.held(trial, token) as mine:
                        if not mine:
                            return
                        os.utime(self._file(trial))
                except (OSError, CheckpointError):
                    continue  # a shared folder that is out of reach for a moment

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def state(self, trial: str) -> TrialState:
        """What is known of a trial.

        Raises:
            CheckpointError: the file cannot be read, so that nobody knows whether somebody works on it.
        """
        path = self._file(trial)
        try:
            return TrialState(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return TrialState()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}", "Make the study folder readable.") from error
        except (ValueError, TypeError) as error:
            hint = "Remove it once nothing works on the study: the trial resumes from its checkpoint."
            raise CheckpointError(f"{path} is damaged ({type(error).__name__})", hint) from None

    def running(self, trial: str) -> bool:
        """Whether somebody works on it, as far as is known; for people."""
        try:
            holder = self.state(trial).holder
            return holder is not None and self._is_alive(trial, holder)
        except (OSError, CheckpointError):
            return False

    def _is_alive(self, trial: str, holder: dict[str, Any]) -> bool:
        if holder.get("machine") == _machine():
            return _start(holder["pid"]) == holder["start"] is not None
        return self._now() - self._file(trial).stat().st_mtime < self._lease

    def _now(self) -> float:
        """The time of the folder's server, by which heartbeats are stamped."""
        probe = self._folder / f".now-{secrets.token_hex(8)}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now

    def _file(self, trial: str) -> Path:
        return self._folder / f"{trial}.json"

    def _write(self, trial: str, state: TrialState) -> None:
        write_file(self._file(trial), json.dumps(asdict(state)).encode())


def _machine() -> str:
    """This machine since it was started, and the processes that this one sees of it.

    Host names alone are shared by machines that were copied and by containers, and outlive a restart.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


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
