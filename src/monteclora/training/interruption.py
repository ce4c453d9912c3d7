"""Stopping on request: SIGINT (Ctrl-C) and SIGTERM let the step end, save, and stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

__all__ = ["Interruption", "TrainingInterrupted", "stop_on_signals"]


class TrainingInterrupted(KeyboardInterrupt):
    """Training was asked to stop, and did after saving; the command line ends with status 130."""


class Interruption:
    """Whether training has been asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def agreed(self, device: torch.device) -> bool:
        """Whether any process of a distributed run has been asked; all of them must call this at the same step."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return self.requested
        flag = torch.tensor(int(self.requested), device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return bool(flag.item())


@contextmanager
def stop_on_signals(acknowledgement: str = "") -> Iterator[Interruption]:
    """Inside the block the first SIGINT or SIGTERM is a request; a second one acts as it would have outside.

    Args:
        acknowledgement: written to standard error when the request comes in; may be empty.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # only the main thread may set signal handlers
        return

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        interruption.requested = True
        restore()
        os.write(2, acknowledgement.encode())  # print may be in the middle of something

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        restore()
