"""What a child process of the sandbox gives up before it runs a program, on Linux (x86-64 and AArch64).

The child runs this file by itself, without the package.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from collections.abc import Sequence

__all__ = ["MACHINES", "NO_FILES", "OWN_USER", "PROTECTIONS", "confine"]

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH of the machines whose system calls are listed here."""

OWN_USER = "a user of its own"
NO_FILES = "no file but Python's own can be read"
PROTECTIONS = {
    OWN_USER: "the program ran as the user of this process",
    NO_FILES: "the program could read files, and so may have seen the tests (the kernel has no Landlock)",
}
"""What is in force where it can be, beyond the filter and the limits, and what its lack means."""

# name: (x86-64, AArch64); None where a machine does not have it
_ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "pipe": (22, None),
    "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23),
    "dup2": (33, None), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160),
    "getcwd": (79, 17), "readlink": (89, None), "gettimeofday": (96, 169), "getrlimit": (97, None),
    "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176),
    "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, None),
    "getgroups": (115, 158), "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44),
    "arch_prctl": (158, None), "gettid": (186, 178), "time": (201, None), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79), "readlinkat": (267, 78),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "dup3": (292, 24), "pipe2": (293, 59), "getcpu": (309, 168), "getrandom": (318, 278), "membarrier": (324, 283),
    "statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
_OPEN, _OPENAT, _CLONE, _CLONE3 = (2, None), (257, 56), (56, 220), (435, 435)
_IOCTL, _FCNTL, _PRLIMIT, _TGKILL = (16, 29), (72, 25), (302, 261), (234, 131)

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000  # the last is O_TMPFILE's own bit
_CLONE_THREAD = 0x10000
_IOCTLS = (0x5401, 0x5413, 0x5421, 0x5450, 0x5451)  # what opening and asking for a terminal need
_FCNTLS = (0, 1, 2, 3, 4, 1030)  # duplicate, flags; not F_SETOWN and F_SETSIG, which have signals sent to others

_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER, _ARCHITECTURE = 0, 4  # offsets into the data that a filter sees
_X32 = 0x40000000


def confine(readable: Sequence[str], memory: int, seconds: int, user: int | None) -> list[str]:
    """Give up all that running a program does not need; there is no way back.

    Args:
        readable: folders and files that may be read.
        memory: bytes of address space.
        seconds: of processor time.
        user: id of the user to become; None to stay.

    Returns:
        Which of :data:`PROTECTIONS` are in force.

    Raises:
        OSError: the kernel refuses the system call filter, or only root can read Python's library.
    """
    found = []
    libc = ctypes.CDLL(None, use_errno=True)
    _limit(memory, seconds)
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        found.append(OWN_USER)
    prctl = libc.prctl
    _check(prctl(1, signal.SIGKILL, 0, 0, 0))  # PR_SET_PDEATHSIG: end with the parent
    _check(prctl(4, 0, 0, 0, 0))  # PR_SET_DUMPABLE: processes of the same user cannot look into this one
    _check(prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    if _restrict_files(libc, readable):
        found.append(NO_FILES)
    _drop_capabilities(libc)
    _filter_system_calls(libc)
    return found


def _limit(memory: int, seconds: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root without them cannot raise its limits again, trace processes, or read what it does not own."""
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    _check(libc.capset(header, bytes(24)))  # effective, permitted and inheritable, twice 32 of them
    try:
        os.listdir(os.path.dirname(os.__file__))
    except PermissionError:
        raise OSError(errno.EACCES, "Python's library belongs to a user who lets nobody but root read it") from None


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _restrict_files(libc: ctypes.CDLL, readable: Sequence[str]) -> bool:
    """Landlock: every access to files but reading ``readable``; False where the kernel has no Landlock."""
    create, add, restrict = 444, 445, 446  # the same numbers on every machine
    version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = (1 << min(13 + max(version - 1, 0), 15 if version < 5 else 16)) - 1
    network, scope = (3, 3)  # no TCP; no signals to, and no abstract sockets of, processes outside
    fields = [handled, *([network] if version >= 4 else []), *([scope] if version >= 6 else [])]
    attribute = struct.pack(f"={len(fields)}Q", *fields)
    rules = _check(libc.syscall(create, attribute, ctypes.c_size_t(len(attribute)), 0))
    for path in readable:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not there, so nothing to read
        rights = 0b1100 if os.path.isdir(path) else 0b100  # READ_FILE, and READ_DIR
        _check(libc.syscall(add, rules, 1, struct.pack("=Qi", rights, handle), 0))
        os.close(handle)
    _check(libc.syscall(restrict, rules, 0))
    os.close(rules)
    return True


def _filter_system_calls(libc: ctypes.CDLL) -> None:
    """seccomp: what is not allowed here fails with EPERM, so there is no network, process, signal or written file."""
    program = b"".join(struct.pack("=HBBI", *step) for step in _steps(platform.machine(), os.getpid()))
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]

    filter_ = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _check(libc.prctl(22, 2, ctypes.byref(filter_), 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


Step = tuple[int, int, int, int]


def _steps(machine: str, process: int) -> list[Step]:
    """The filter: steps of (code, steps to skip if true, if false, operand)."""
    column = list(MACHINES).index(machine)
    denied, missing = _error(errno.EPERM), _error(errno.ENOSYS)
    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, MACHINES[machine]), (_RETURN, 0, 0, _KILL)]
    steps += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for numbers in _ALLOWED.values():
        steps += _if_call(numbers[column], [(_RETURN, 0, 0, _ALLOW)])
    for numbers, argument in ((_OPEN, 1), (_OPENAT, 2)):
        steps += _if_call(numbers[column], _by_argument(argument, [(_ANY_BIT, _WRITING)], _error(errno.EACCES), _ALLOW))
    steps += _if_call(_CLONE[column], _by_argument(0, [(_ANY_BIT, _CLONE_THREAD)], _ALLOW, denied))
    steps += _if_call(
        _CLONE3[column], [(_RETURN, 0, 0, missing)]
    )  # its flags are out of sight; libraries then call clone
    steps += _if_call(_IOCTL[column], _by_argument(1, [(_EQUAL, value) for value in _IOCTLS], _ALLOW, denied))
    steps += _if_call(_FCNTL[column], _by_argument(1, [(_EQUAL, value) for value in _FCNTLS], _ALLOW, denied))
    steps += _if_call(_PRLIMIT[column], _by_argument(0, [(_EQUAL, 0)], _ALLOW, denied))
    steps += _if_call(_TGKILL[column], _by_argument(0, [(_EQUAL, process)], _ALLOW, denied))
    return [*steps, (_RETURN, 0, 0, denied)]


def _error(code: int) -> int:
    return 0x00050000 | code


def _if_call(number: int | None, body: list[Step]) -> list[Step]:
    return [] if number is None else [(_EQUAL, 0, len(body), number), *body]


def _by_argument(argument: int, tests: Sequence[tuple[int, int]], then: int, otherwise: int) -> list[Step]:
    """Return ``then`` where one of the tests holds of the argument's lower half (these machines are little-endian)."""
    body: list[Step] = [(_LOAD, 0, 0, 16 + 8 * argument)]
    for code, operand in tests:
        body += [(code, 0, 1, operand), (_RETURN, 0, 0, then)]
    return [*body, (_RETURN, 0, 0, otherwise)]
