"""What a run was trained on: versions, device, threads, the state of the code, the data."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import monteclora
from monteclora.data import TaskData
from monteclora.training.recipe import Recipe, recipe_sha256

__all__ = ["PeakMemory", "changes", "describe_environment", "training_device"]

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
    "bitsandbytes",
)


def describe_environment(recipe: Recipe, data: TaskData, device: torch.device) -> dict[str, Any]:
    """The content of ``environment.json``."""
    return {
        "format": 1,  # of the run folder
        "monteclora": monteclora.__version__,
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "device": _device_name(device),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "code": _git_state(),
        "recipe_sha256": recipe_sha256(recipe),
        "seeds": {"run": recipe.seed, "data": recipe.data.seed},
        "data": {
            "name": data.name,
            "kind": data.kind,
            "label_names": data.label_names,
            "splits": {
                name: {"origin": source.origin, "rows": source.rows, "sha256": source.sha256}
                for name, source in data.sources.items()
            },
            "notes": list(data.notes),
        },
    }


def training_device() -> torch.device:
    """The device that training takes: this process's GPU, another accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two environments and may change the numbers, each as ``torch 2.9 -> 2.13``."""
    flat = [
        {**{f: facts.get(f) for f in ("monteclora", "python", "device", "threads")}, **facts.get("packages", {})}
        for facts in (before, now)
    ]
    return [f"{key} {flat[0].get(key)} -> {value}" for key, value in flat[1].items() if flat[0].get(key) != value]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}"


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from, and whether it has changes; None where it is installed."""
    folder = os.path.dirname(os.path.abspath(monteclora.__file__))

    def git(*arguments: str) -> str:
        command = ["git", "-C", folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None  # installed inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", folder))}
    except (OSError, subprocess.SubprocessError):
        return None


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
        """Start the kernel's high-water mark anew; where it cannot be, the peak is that of the process's life."""
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            return
