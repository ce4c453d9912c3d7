"""Compiled modules that run uncompiled for a moment, whatever threads ask for it and in whatever order they end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["uncompiled"]

_lock = threading.Lock()
_inside = 0
_stance: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Nothing is compiled in the block, and what was compiled runs as it was written.

    The compiler's stance is one for all threads, and each block of :func:`torch.compiler.set_stance` puts back what it
    found: of two that overlap, the one that ends last would leave the process uncompiled for good. So the first to come
    changes it, and the last to go puts it back.
    """
    global _inside, _stance
    with _lock:
        if not _inside:
            _stance = torch.compiler.set_stance("force_eager")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _stance.__exit__(None, None, None)
