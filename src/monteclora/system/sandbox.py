"""Programs that a model wrote, run and tested with as little trust as can be.

A check takes two child processes. One runs the program, the other the tests; the parent runs neither. The tests call
the program's function over a pipe, and only values of plain types (numbers, text, lists, tuples, dicts, sets) come
back, so that the program can neither change the tests nor say that it passed: the verdict comes from the process of the
tests, over a pipe that the program's process does not have, with a secret that only the parent and the tests know. The
program is not given the tests; with Landlock it cannot read them from the data's file either.

Both children run under
    a system call filter (seccomp): no network, no process beside their own, no signal to others, no file made, opened
    for writing, renamed or removed; what is not known to be needed fails;
    limits of memory, processor time, open files and size of written files, and a time after which both are killed;
    no capabilities, also where they are root's;
    a user of their own, where the parent is root and Python can be read by others;
    Landlock, where the kernel has it: no file can be read but Python's own and the system's libraries.
Without the filter nothing is run.

What this does not protect against: a defect of the kernel; a slower machine for as long as a program is allowed to run;
measurements of other processes through the processor's caches; and, without Landlock, a program that reads what its
user may read, the tests among it (it has no way to send it anywhere). :attr:`Outcome.missing` says which protections a
check had to do without. The code of the data set, the tests, is trusted to judge fairly; it
runs under the same confinement. For programs that somebody wrote to break out, use a virtual machine as well.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import stat
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monteclora.errors import UnsafeCodeError
from monteclora.system.confinement import MACHINES, PROTECTIONS

__all__ = ["Limits", "Outcome", "require_sandbox", "run_check"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SYSTEM = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/dev/null",
    "/dev/urandom",
)
_NOBODY = 65534


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: from start to verdict.
        memory: bytes of address space of each process.
    """

    seconds: float = 10.0
    memory: int = 2**30


@dataclass(frozen=True)
class Outcome:
    """What came of a check.

    Attributes:
        passed: whether every test passed.
        reason: why not.
        in_force: which of :data:`~monteclora.system.confinement.PROTECTIONS`; None where there was no verdict.
        timed_out: whether there was none in time.
    """

    passed: bool
    reason: str = ""
    in_force: tuple[str, ...] | None = None
    timed_out: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """What it means that protections were not in force, in words."""
        if self.in_force is None:
            return ()
        return tuple(lack for protection, lack in PROTECTIONS.items() if protection not in self.in_force)


def require_sandbox() -> None:
    """Raise UnsafeCodeError where programs cannot be confined."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise UnsafeCodeError(
            f"programs are run on Linux ({' or '.join(MACHINES)}), this is {platform.system()} {platform.machine()}",
            "Use such a machine, or a container or virtual machine with it.",
        )


def run_check(program: str, trusted: str, test: str, entry_point: str, limits: Limits = Limits()) -> Outcome:
    """Run a program and test one of its functions.

    Args:
        program: source code that nobody trusts; defines ``entry_point``.
        trusted: source code that the tests need beside their own.
        test: source code of the tests; defines ``check``, which takes the function and raises where it is wrong.
        entry_point: name of the function.
        limits: of each of the two processes.

    Raises:
        UnsafeCodeError: this machine cannot confine the program; it was not run.
    """
    require_sandbox()
    token = secrets.token_hex(16)
    task = {"token": token, "program": program, "trusted": trusted, "test": test, "entry_point": entry_point}
    to_tests, from_program = os.pipe()
    to_program, from_tests = os.pipe()
    children: list[subprocess.Popen[bytes]] = []
    try:
        children.append(_start("program", to_program, from_program, limits))
        children.append(_start("tests", to_tests, from_tests, limits))
        for handle in (to_tests, from_program, to_program, from_tests):
            os.close(handle)
        try:
            output, _ = children[1].communicate(json.dumps(task).encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"no verdict within {limits.seconds:g} seconds", timed_out=True)
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return _outcome(output, token)


def _start(role: str, reading: int, writing: int, limits: Limits) -> subprocess.Popen[bytes]:
    settings = {
        "reading": reading,
        "writing": writing,
        "readable": _readable(),
        "memory": limits.memory,
        "seconds": int(limits.seconds) + 1,
        "user": _NOBODY if _can_change_user() else None,
    }
    tests = role == "tests"
    return subprocess.Popen(
        [sys.executable, "-I", "-B", str(_CHILD), role, json.dumps(settings)],
        stdin=subprocess.PIPE if tests else subprocess.DEVNULL,
        stdout=subprocess.PIPE if tests else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        pass_fds=(reading, writing),
        start_new_session=True,
    )


def _outcome(output: bytes, token: str) -> Outcome:
    try:
        verdict: dict[str, Any] = json.loads(output)
    except ValueError:
        return Outcome(False, "the tests ended without a verdict")
    if not secrets.compare_digest(str(verdict.get("token")), token):
        return Outcome(False, "the verdict is not that of the tests")
    in_force = verdict.get("in_force")
    if in_force is None:
        refusal = verdict.get("refusal") or verdict.get("reason") or "the program's process did not start"
        raise UnsafeCodeError(
            f"the program was not run, its process cannot be confined: {refusal}",
            "Use a machine or container that allows seccomp filters, and a Python that others can read.",
        )
    return Outcome(verdict["passed"] is True, str(verdict["reason"]), tuple(in_force))


def _readable() -> list[str]:
    python = {sys.prefix, sys.base_prefix, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib"))}
    if "/usr" in python:  # Python of the system: its libraries, not all that is installed
        python = (python - {"/usr"}) | {os.path.dirname(os.__file__)}
    return [*sorted(python), *_SYSTEM]


def _can_change_user() -> bool:
    """Whether this is root, and another user could still read Python's library."""
    if os.geteuid() != 0:
        return False
    paths = {Path(path) for path in (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))}
    folders = {folder for path in paths for folder in (path, *path.parents)}
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in folders)
