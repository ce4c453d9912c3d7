"""What a run was trained on: versions, device, threads, the state of the code, the data."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from monteclora.runs.determining import recipe_sha256
from monteclora.runs.recipe import Recipe
from monteclora.runs.recipe_paths import started_in
from monteclora.system.devices import device_name, process_count
from monteclora.system.version import VERSION
from monteclora.tasks import TaskData

__all__ = ["changes", "describe_environment"]

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
        "monteclora": VERSION,
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "device": device_name(device),
        "processes": process_count(),
        "threads": torch.get_num_threads(),
        "code": _git_state(),
        "started_in": started_in(recipe.folder),
        "recipe_sha256": recipe_sha256(recipe),
        "method": dataclasses.asdict(recipe.method.resolved()),  # with the values that other options decide
        "seeds": {"run": recipe.seed, "data": recipe.data.seed},
        "data": {
            "name": data.name,
            "kind": data.kind,
            "label_names": data.label_names,
            "columns": None if data.columns is None else dataclasses.asdict(data.columns),
            "scale": None if data.scale is None else dataclasses.asdict(data.scale),
            "splits": {
                name: {"origin": source.origin, "rows": source.rows, "sha256": source.sha256}
                for name, source in data.sources.items()
            },
            "notes": list(data.notes),
        },
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
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


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from, and whether it has changes; None where it is installed."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*arguments: str) -> str:
        command = ["git", "-C", folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None  # installed inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", folder))}
    except (OSError, subprocess.SubprocessError):
        return None
