"""``monteclora doctor``: what is here, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from monteclora.cli.listing import models_at_hand, tasks_at_hand
from monteclora.cli.output import Json, print_facts, print_json
from monteclora.system.version import VERSION

__all__ = ["doctor"]


def doctor(*, as_json: Json = False) -> int:
    """Show versions, devices, caches, models and data, and how to get what is missing.

    Ends with status 1 where something required is missing.
    """
    # importing what reads the packages' metadata takes as long as all the rest of the command line
    from monteclora.cli import installed

    required = installed.required()
    found: dict[str, Any] = {
        "monteclora": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": required,
        "extras": installed.extras(),
        "devices": _devices() if installed.at_hand("torch") else [],
        "threads": os.cpu_count(),
        "caches": _caches(),
        "models": models_at_hand(),
        "data": _data(),
    }
    missing = [package["name"] for package in required if not package["fits"]]
    if as_json:
        print_json({**found, "missing": missing})
    else:
        _print(found)
    if missing:
        print(f"required and not as they should be: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def _devices() -> list[str]:
    import torch

    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [f"cuda: {device.name}, {device.total_memory / 1e9:.0f} GB" for device in properties]
    other = torch.accelerator.current_accelerator()
    return [other.type] if other else [f"cpu: {torch.get_num_threads()} threads in use"]


def _caches() -> dict[str, str]:
    from huggingface_hub import constants

    from monteclora.data.gguf import cache_folder

    offline = " (offline: HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    return {"models made here": str(cache_folder()), "hub": f"{constants.HF_HUB_CACHE}{offline}"}


def _data() -> dict[str, Any]:
    from monteclora.data.sources import DATA_FOLDER_VARIABLE

    local = [task["name"] for task in tasks_at_hand() if task["where"] == DATA_FOLDER_VARIABLE]
    return {"variable": DATA_FOLDER_VARIABLE, "folder": os.environ.get(DATA_FOLDER_VARIABLE), "tasks": local}


def _print(found: dict[str, Any]) -> None:
    facts = [("monteclora", found["monteclora"]), ("python", f"{found['python']} on {found['platform']}")]
    for package in found["packages"]:
        facts.append((package["name"], _state(package, f"pip install '{package['name']}{package['wanted']}'")))
    for package in found["extras"]:
        command = f"pip install 'monteclora[{package['extra']}]'"
        facts.append((package["name"], _state(package, command, optional=True)))
    facts += [("device", device) for device in found["devices"]]
    facts.append(("processors", str(found["threads"])))
    facts += [(f"cache, {name}", path) for name, path in found["caches"].items()]
    for model in found["models"]:
        facts.append((f"model {model['name']}", str(model["path"] or f"not installed. {model['remedy']}")))
    data = found["data"]
    hint = f"{data['variable']} is not set: tasks are read from the hub (helpdesk is bundled)"
    tasks = ", ".join(data["tasks"]) or "no task found: it should hold <task>/<split>.jsonl.gz"
    facts.append(("data", f"{data['folder']}: {tasks}" if data["folder"] else hint))
    print_facts(facts)


def _state(package: dict[str, Any], command: str, optional: bool = False) -> str:
    if package["fits"]:
        return str(package["version"])
    kind = "optional, " if optional else ""
    state = (
        f"not installed ({kind}" if package["version"] is None else f"{package['version']} is too old or new ({kind}"
    )
    return f"{state}get it: {command})"
