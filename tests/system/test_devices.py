"""The memory that a run is said to have used is its own."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from monteclora.system.devices import PeakMemory

glibc = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not glibc, reason="the C library gives memory back in its own way")
def test_what_an_earlier_run_freed_is_not_in_the_next_ones_peak() -> None:
    before = PeakMemory(torch.device("cpu")).bytes
    # below the size that has pages of its own, with a few in between that stay: the C library keeps what is freed
    tensors = [torch.ones(16_000) for _ in range(4000)]
    kept = tensors[::100]
    used = PeakMemory(torch.device("cpu"))
    assert used.bytes > before + 200e6
    del tensors
    assert PeakMemory(torch.device("cpu")).bytes < before + 50e6
    assert len(kept) == 40
