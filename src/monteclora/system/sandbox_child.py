"""The two processes of a check in the sandbox: one runs the program, the other tests it. Run by itself, not imported.

    python -I sandbox_child.py program|tests SETTINGS

They talk in lines of JSON over two pipes. All that the program's process can do is answer a call with a value of a
plain type; whether that value is right is decided in the process of the tests, which the program never enters.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from confinement import confine

del sys.path[0]

_LONGEST = 2**24  # characters of a line: more is no answer to a question of this kind


def encode(value: Any) -> Any:
    """A plain value for JSON; TypeError for any other, and for what only pretends to be one."""
    if value is None or type(value) in (bool, str, float, int):
        return value
    for plain in (str, int, float):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise TypeError(f"a {type(value).__name__} is no plain value")


def decode(value: Any) -> Any:
    """The value that :func:`encode` was given. Raises ValueError or TypeError for anything else."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item) for item in content)


class Channel:
    """Lines of JSON from one pipe and to another."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading: BinaryIO = os.fdopen(reading, "rb")
        self._writing: BinaryIO = os.fdopen(writing, "wb")

    def send(self, message: Any) -> None:
        """Write a line."""
        self._writing.write(json.dumps(message).encode() + b"\n")
        self._writing.flush()

    def receive(self) -> Any:
        """Read a line. Raises EOFError where there is none, ValueError where it is no JSON or too long."""
        line = self._reading.readline(_LONGEST)
        if not line:
            raise EOFError("the program ended")
        if not line.endswith(b"\n"):
            raise ValueError("the program's answer is too long")
        return json.loads(line)


def run_program(channel: Channel) -> None:
    """Run the program that comes first, then its function, call by call."""
    first = channel.receive()
    try:
        space: dict[str, Any] = {"__name__": "program"}
        exec(compile(first["program"], "program.py", "exec"), space)
        function = space[first["entry_point"]]
    except BaseException as error:
        channel.send({"error": _describe(error)})
        return
    channel.send({"ready": True})
    while True:
        request = channel.receive()
        try:
            answer = {"value": encode(function(*decode(request["args"]), **decode(request["kwargs"])))}
        except BaseException as error:
            answer = {"error": _describe(error)}
        channel.send(answer)


def run_tests(channel: Channel, task: dict[str, str]) -> dict[str, Any]:
    """Test the function at the other end of the channel; what came of it, with the token that proves its origin."""
    verdict: dict[str, Any] = {"token": task["token"], "passed": False, "reason": "", "in_force": None}
    try:
        hello = channel.receive()
        verdict["in_force"] = hello["in_force"]
        channel.send({"program": task["program"], "entry_point": task["entry_point"]})
        if (error := channel.receive().get("error")) is not None:
            verdict["reason"] = str(error)[:500]
            return verdict
        space: dict[str, Any] = {"__name__": "tests"}
        exec(compile(task["trusted"], "trusted.py", "exec"), space)
        exec(compile(task["test"], "test.py", "exec"), space)
        space["check"](_caller(channel))
        verdict["passed"] = True
    except AssertionError as error:
        verdict["reason"] = f"a test failed {error}".strip()[:500]
    except BaseException as error:
        verdict["reason"] = _describe(error)
    return verdict


def _caller(channel: Channel) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        channel.send({"args": encode(list(args)), "kwargs": encode(kwargs)})
        answer = channel.receive()
        if not isinstance(answer, dict) or "value" not in answer:
            raise RuntimeError(f"the program: {answer.get('error') if isinstance(answer, dict) else 'no answer'}")
        return decode(answer["value"])

    return call


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:
        return "an error that cannot be shown"


def main() -> None:
    """Confine this process, then do its part."""
    role, settings = sys.argv[1], json.loads(sys.argv[2])
    task = json.loads(sys.stdin.buffer.read()) if role == "tests" else {}
    channel = Channel(settings["reading"], settings["writing"])
    verdict_file = os.fdopen(os.dup(1), "wb")
    # what program and tests print goes nowhere
    nowhere = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(nowhere, handle)
    os.close(nowhere)
    try:
        in_force = confine(settings["readable"], settings["memory"], settings["seconds"], settings["user"])
        refusal = None
    except (OSError, ValueError) as error:
        in_force, refusal = None, str(error)
    if role == "program":
        verdict_file.close()
        channel.send({"in_force": in_force, "refusal": refusal})
        if in_force is not None:
            run_program(channel)
        return
    verdict = {"token": task["token"], "refusal": refusal} if refusal else run_tests(channel, task)
    verdict_file.write(json.dumps(verdict).encode())
    verdict_file.close()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, EOFError):
        main()
    os._exit(0)
