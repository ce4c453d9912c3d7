"""Honest programs pass, and hostile ones neither pass nor harm anything.

A hostile program answers rightly only where its attack succeeded, so that passing would show it.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from monteclora.errors import UnsafeCodeError
from monteclora.system import sandbox
from monteclora.system.confinement import MACHINES, NO_FILES, OWN_USER, PROTECTIONS, _steps
from monteclora.system.sandbox import Limits, run_check
from monteclora.system.sandbox_child import decode, encode

TEST = "def check(candidate):\n    for x in (2, 3, 4):\n        assert candidate(x) == x * x, x\n"
PROGRAM = "def solve(x):\n    return x * x\n"
SHORT, LONG = Limits(seconds=2, memory=2**29), Limits(seconds=60)

linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")


def run(program, test=TEST, limits=LONG, trusted=""):
    return run_check(program, trusted, test, "solve", limits)


# honest programs


@linux
def test_a_right_program_passes_and_a_wrong_one_is_told_why():
    assert run(PROGRAM).passed
    wrong = run("def solve(x):\n    return x + x\n")
    assert not wrong.passed
    assert "a test failed 3" in wrong.reason
    assert "ZeroDivisionError" in run("def solve(x):\n    return 1 // 0\n").reason
    assert "SyntaxError" in run("def solve(x:\n").reason
    assert "KeyError: 'solve'" in run("def other(x):\n    return x\n").reason


@linux
def test_imports_helpers_and_what_a_program_prints():
    program = (
        "import collections, functools, hashlib, heapq, itertools, math, re, string, typing, random, copy, decimal\n"
        "print('noise')\n"
        "@functools.lru_cache\n"
        "def helper(x):\n    return x\n"
        "def solve(x):\n    print('more', x)\n    return math.prod([helper(x), helper(x)])\n"
    )
    assert run(program).passed


@linux
def test_tests_use_what_they_are_given():
    test = "def check(candidate):\n    assert candidate(helper(2)) == 9\n    assert candidate(x=1) == 1\n"
    assert run(PROGRAM, test, trusted="def helper(x):\n    return x + 1\n").passed


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**80),
        0.1,
        float("inf"),
        "text \ud800 \n",
        [1, [2, ["three"]]],
        (1, "a", (None,)),
        {1: "one", (2, 3): [4]},
        {1, 2},
        frozenset({"a"}),
        1 + 2j,
        b"\x00\xff",
    ],
)
def test_plain_values_come_back_as_they_are(value):
    import json

    found = decode(json.loads(json.dumps(encode(value))))
    assert found == value
    assert type(found) is type(value)


def test_nothing_but_plain_values_is_sent():
    class Always(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    assert type(encode(Always(3))) is int
    for value in (object(), (x for x in ()), lambda: 0, [object()]):
        with pytest.raises(TypeError):
            encode(value)
    for message in ({"code": 1}, {"tuple": [1], "set": [2]}, {}):
        with pytest.raises((KeyError, ValueError)):
            decode(message)


# hostile programs

READERS = ("list-a-folder", "read-a-file", "read-users-and-processes")  # which Landlock alone keeps from it
HOSTILE = sorted((Path(__file__).parent / "hostile").glob("*.txt"))  # not .py: nothing must import them


def test_there_are_hostile_programs():
    assert len(HOSTILE) >= 25


@linux
@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.stem)
def test_a_hostile_program_neither_passes_nor_harms(path, tmp_path):
    folder = tmp_path / "open to all"
    folder.mkdir(mode=0o777)
    canary = folder / "canary"
    canary.write_text("unharmed")
    canary.chmod(0o666)
    before = canary.stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        places = {"CANARY": canary, "FOLDER": folder, "NEW": folder / "new"}
        program = path.read_text()
        for name, place in places.items():
            program = program.replace(name, repr(str(place)))
        program = program.replace("PORT", str(server.getsockname()[1])).replace("PARENT", str(os.getpid()))
        outcome = run(program, limits=SHORT)
        with pytest.raises(BlockingIOError):
            server.accept()
    if path.stem in READERS and NO_FILES not in (outcome.in_force or ()):
        assert outcome.missing
    else:
        assert not outcome.passed, outcome
        assert outcome.reason
    assert [path.name for path in folder.iterdir()] == ["canary"]
    assert canary.read_text() == "unharmed"
    after = canary.stat()
    assert (after.st_mtime_ns, after.st_mode) == (before.st_mtime_ns, before.st_mode)
    assert not _children()


@linux
def test_a_program_after_hostile_ones_is_judged_as_ever():
    assert run(PROGRAM).passed
    assert not run("def solve(x):\n    return x + x\n").passed


@linux
def test_limits_hold_where_root_cannot_become_another_user(monkeypatch):
    monkeypatch.setattr(sandbox, "_can_change_user", lambda: False)
    for name in ("limits-of-its-own", "limits-of-the-parent"):
        program = next(path for path in HOSTILE if path.stem == name).read_text()
        outcome = run(program.replace("PARENT", str(os.getpid())))
        assert not outcome.passed
        assert "not permitted" in outcome.reason or "not allowed" in outcome.reason
    passed = run(PROGRAM)
    assert passed.passed
    assert PROTECTIONS[OWN_USER] in passed.missing


@linux
def test_no_capability_is_left():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from confinement import confine\n"
        "status = open('/proc/self/status')\n"
        "confine([sys.prefix, sys.base_prefix, '/lib', '/usr/lib'], 2**30, 60, None)\n"
        "print(*(line.split()[1] for line in status if line[:6] in ('CapInh', 'CapPrm', 'CapEff')), flush=True)\n"
    )
    found = subprocess.run(
        [sys.executable, "-Ic", code, str(Path(sandbox.__file__).parent)], capture_output=True, text=True, timeout=60
    )
    assert found.stdout.split() == ["0" * 16] * 3, found.stderr


@linux
def test_a_check_says_what_it_had_to_do_without_and_that_time_was_short():
    outcome = run(PROGRAM)
    assert set(outcome.in_force) <= set(PROTECTIONS)
    assert len(outcome.in_force) + len(outcome.missing) == len(PROTECTIONS)
    late = run("def solve(x):\n    while True: pass\n", limits=Limits(seconds=1))
    assert (late.timed_out, late.missing) == (True, ())
    assert not outcome.timed_out


def _children():
    """Processes of the sandbox that are left."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            if any(word.endswith(b"sandbox_child.py") for word in words) and f"{os.getpid()}" in _parent(path):
                found.append(words)
        except OSError:
            continue
    return found


def _parent(cmdline):
    return [line.split()[1] for line in (cmdline.parent / "status").read_text().splitlines() if line.startswith("PPid")]


# the machine


def test_a_machine_that_cannot_confine_a_program_does_not_run_it(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(UnsafeCodeError, match="riscv64"):
        run(PROGRAM)


@linux
def test_a_program_that_cannot_be_confined_is_not_run(monkeypatch, tmp_path):
    """A child that reports a refusal by the kernel, as where a container forbids filters."""
    child = tmp_path / "sandbox_child.py"
    source = Path(sandbox._CHILD).read_text()
    child.write_text(source.replace("from confinement import confine", "def confine(*_):\n    raise OSError(1, 'no')"))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    with pytest.raises(UnsafeCodeError, match="was not run"):
        run(PROGRAM)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_fits_and_ends_in_a_refusal(machine):
    steps = _steps(machine, 1)
    assert len(steps) < 4096
    assert steps[-1] == (0x06, 0, 0, 0x00050001)
    for position, (code, if_true, if_false, _) in enumerate(steps[:-1]):
        assert code in (0x06, 0x15, 0x20, 0x35, 0x45)
        assert position + 1 + max(if_true, if_false) < len(steps)
