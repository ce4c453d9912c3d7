"""Honest programs pass, and hostile ones neither pass nor harm anything.

A hostile program answers rightly only where its attack succeeded, so that passing would show it.
"""

import os
import socket
import sys
from pathlib import Path

import pytest

from monteclora.errors import UnsafeCodeError
from monteclora.system import sandbox
from monteclora.system.confinement import MACHINES, _steps
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

HOSTILE = {
    "fork bomb": "import os\ndef solve(x):\n    while True:\n        os.fork()\n",
    "one child": "import os\ndef solve(x):\n    if os.fork() == 0:\n        os._exit(0)\n    return x * x\n",
    "another program": "import subprocess\ndef solve(x):\n    subprocess.run(['/bin/true'], check=True)\n    return x * x\n",
    "exec": "import os\nos.execv('/bin/true', ['true'])\n",
    "threads without end": "import threading, time\ndef solve(x):\n    while True:\n        threading.Thread(target=time.sleep, args=(99,)).start()\n",
    "memory at once": "def solve(x):\n    len(bytearray(2**33))\n    return x * x\n",
    "memory bit by bit": "def solve(x):\n    kept = []\n    for _ in range(2**12):\n        kept.append(bytearray(b'x') * 2**20)\n    return x * x\n",
    "a file on the disk": "def solve(x):\n    open({new!r}, 'wb').write(b'x' * 2**30)\n    return x * x\n",
    "a folder, a pipe, a link": "import os\ndef solve(x):\n    for make in (os.mkdir, os.mkfifo, lambda p: os.symlink('/', p)):\n        try:\n            make({new!r})\n            return x * x\n        except OSError:\n            pass\n",
    "a file without a name": "import os\ndef solve(x):\n    os.write(os.memfd_create('x'), b'x')\n    return x * x\n",
    "a connection": "import socket\ndef solve(x):\n    socket.create_connection(('127.0.0.1', {port}), 1)\n    return x * x\n",
    "a datagram": "import socket\ndef solve(x):\n    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))\n    return x * x\n",
    "a local socket": "import socket\ndef solve(x):\n    socket.socketpair()\n    return x * x\n",
    "an endless loop": "def solve(x):\n    while True:\n        pass\n",
    "an endless loop at import": "while True:\n    pass\n",
    "sleep": "import time\ndef solve(x):\n    time.sleep(10**6)\n",
    "read a file": "def solve(x):\n    open({canary!r}).read()\n    return x * x\n",
    "read users and processes": "import os\ndef solve(x):\n    for path in ('/etc/passwd', '/proc/self/environ', f'/proc/{{os.getppid()}}/cmdline'):\n        try:\n            open(path).read()\n            return x * x\n        except OSError:\n            pass\n",
    "list a folder": "import os\ndef solve(x):\n    os.listdir({folder!r})\n    return x * x\n",
    "overwrite a file": "def solve(x):\n    open({canary!r}, 'w').write('harmed')\n    return x * x\n",
    "remove a file": "import os\ndef solve(x):\n    os.remove({canary!r})\n    return x * x\n",
    "truncate, rename, change mode": "import os\ndef solve(x):\n    for harm in (lambda p: os.truncate(p, 0), lambda p: os.rename(p, p + '2'), lambda p: os.chmod(p, 0), lambda p: os.utime(p, (0, 0))):\n        try:\n            harm({canary!r})\n            return x * x\n        except OSError:\n            pass\n",
    "kill the parent": "import os\ndef solve(x):\n    os.kill(os.getppid(), 9)\n    return x * x\n",
    "kill everybody": "import os\ndef solve(x):\n    for kill in (lambda: os.kill(-1, 9), lambda: os.killpg(0, 9), lambda: os.kill({parent}, 15)):\n        try:\n            kill()\n            return x * x\n        except OSError:\n            pass\n",
    "limits of the parent": "import os, resource\ndef solve(x):\n    resource.prlimit({parent}, resource.RLIMIT_NOFILE, (0, 0))\n    return x * x\n",
    "limits of its own": "import resource\ndef solve(x):\n    resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))\n    return x * x\n",
    "a signal by way of a file": "import fcntl, os\ndef solve(x):\n    fcntl.fcntl(3, fcntl.F_SETOWN, {parent})\n    return x * x\n",
    "system calls by hand": "import ctypes\ndef solve(x):\n    libc = ctypes.CDLL(None)\n    for call in (lambda: libc.socket(2, 1, 0), lambda: libc.syscall(57), lambda: libc.ptrace(16, {parent}, 0, 0), lambda: libc.unshare(0x10000000), lambda: libc.syscall(425, 1, 0)):\n        if call() >= 0:\n            return x * x\n",
    "a crash": "import ctypes\ndef solve(x):\n    ctypes.string_at(0)\n    return x * x\n",
    "close the channel": "import os\nos.closerange(0, 256)\ndef solve(x):\n    return x * x\n",
    "a verdict of its own": "import json, os\nfor handle in range(256):\n    try:\n        os.write(handle, json.dumps({{'token': '', 'passed': True, 'in_force': []}}).encode() + b'\\n')\n    except OSError:\n        pass\ndef solve(x):\n    return None\n",
    "say passed and exit": "print('passed')\nraise SystemExit(0)\n",
    "os._exit": "import os\nos._exit(0)\n",
    "os._exit when called": "import os\ndef solve(x):\n    print('passed', flush=True)\n    os._exit(0)\n",
    "equal to everything": "class Same:\n    def __eq__(self, other):\n        return True\n    __hash__ = None\ndef solve(x):\n    return Same()\n",
    "a number equal to everything": "class Same(int):\n    def __eq__(self, other):\n        return True\n    __ne__ = None\ndef solve(x):\n    return Same(-1)\n",
    "monkeypatching": "import builtins, json, sys\nbuiltins.AssertionError = Warning\nbuiltins.isinstance = lambda *_: True\njson.dumps = lambda *_: '{{\"value\": true, \"passed\": true}}'\nmain = sys.modules['__main__']\nmain.encode = lambda value: value\nmain.run_tests = lambda *_: {{'passed': True}}\ndef solve(x):\n    return 1\n",
    "look for the secret": "import gc, sys\ndef solve(x):\n    frame, seen = sys._getframe(), []\n    while frame:\n        seen.append(repr(frame.f_locals))\n        frame = frame.f_back\n    text = ''.join(seen) + repr(sys.argv) + repr([o for o in gc.get_objects() if isinstance(o, dict) and 'token' in o])\n    return x * x if 'assert' + ' candidate' in text or \"'token':\" + ' ' in text else None\n",
    "an answer without end": "import os\ndef solve(x):\n    return 'x' * 2**25\n",
    "brackets without end": "import os\ndef solve(x):\n    for handle in range(3, 64):\n        try:\n            os.write(handle, b'[' * 60000 + b'\\n')\n        except OSError:\n            pass\n",
    "recursion without end": "def solve(x):\n    import sys\n    sys.setrecursionlimit(10**9)\n    return solve(x)\n",
}


@linux
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_neither_passes_nor_harms(name, tmp_path):
    folder = tmp_path / "open to all"
    folder.mkdir(mode=0o777)
    canary = folder / "canary"
    canary.write_text("unharmed")
    canary.chmod(0o666)
    before = canary.stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        places = {"canary": str(canary), "folder": str(folder), "new": str(folder / "new")}
        program = HOSTILE[name].format(**places, port=server.getsockname()[1], parent=os.getpid())
        outcome = run(program, limits=SHORT)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not outcome.passed, outcome
    assert outcome.reason
    assert [path.name for path in folder.iterdir()] == ["canary"]
    assert canary.read_text() == "unharmed"
    after = canary.stat()
    assert (after.st_mtime_ns, after.st_mode) == (before.st_mtime_ns, before.st_mode)
    assert not _children()
    assert run(PROGRAM).passed  # and the next one is judged as ever


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
