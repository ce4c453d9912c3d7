"""The device of this process, its place among the processes of a run, and the memory it has used."""

from __future__ import annotations

import ctypes
import gc
import os
import platform

import torch

__all__ = [
    "PeakMemory",
    "device_name",
    "is_main_process",
    "process_count",
    "process_index",
    "training_device",
    "usable_cores",
]


def process_index() -> int:
    """This process's number among those that train together, from 0."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0"))  # set by accelerate launch and torchrun before anything is initialised


def process_count() -> int:
    """How many processes train together."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes files."""
    return process_index() == 0


def training_device() -> torch.device:
    """The device that training takes: this process's GPU, another accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def usable_cores() -> int:
    """The processor cores that this process may run on, which a container or a scheduler can make fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """For people: the kind of device and its model."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}"


class PeakMemory:
    """The most memory in use since it was made: of the GPU where there is one, else of the process.

    Args:
        device: of training.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _give_freed_memory_back()
            self._reset_process()

    @property
    def bytes(self) -> int:
        """Bytes at the peak."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            with open("/proc/self/status") as status:
                peak = next(line for line in status if line.startswith("VmHWM:"))
            return int(peak.split()[1]) * 1024
        except (OSError, StopIteration):
            import resource  # not on Windows

            unit = 1 if platform.system() == "Darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    @staticmethod
    def _reset_process() -> None:
        """Reset the kernel's high-water mark; where that is not possible, the peak is that of the process's life."""
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            return


def _give_freed_memory_back() -> None:
    """To the system, where the C library keeps it: glibc does, in pieces between those in use.

    Of a process that trains run after run, tensors of many sizes leave gigabytes of such pieces, which would count as
    the next run's, and which other processes lack.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
