"""Where results are kept, under which circumstances they were found, and how they are shown."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from monteclora.system.atomic import write_file

FOLDER = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "peft")


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results; finished cases are kept")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cases to run, such as 'smollm2-*'")
    parser.add_argument("--list", action="store_true", help="list the cases and run none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    return parser


def timed_arguments(description: str) -> argparse.ArgumentParser:
    """Those, and for how long to measure."""
    parser = arguments(description)
    parser.add_argument("--seconds", type=float, default=90.0, help="time for each case, within 7 to 61 rounds")
    parser.add_argument("--rounds", type=int, help="number of rounds instead")
    return parser


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on."""
    found = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def available_memory(device: str = "cpu") -> float:
    """Bytes that are free on the device."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def run_cases(benchmark: str, cases: Mapping[str, Callable[[], dict[str, Any]]], args: argparse.Namespace) -> None:
    """Measure the chosen cases that are not finished, and show the results of all that are.

    Each case has a file of its own, written when it is finished and whole.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = {name: measure for name, measure in cases.items() if fnmatch.fnmatch(name, args.only)}
    if not chosen:
        sys.exit(f"no case matches '{args.only}'; there are {', '.join(cases)}")
    folder = args.out / benchmark
    for name, measure in chosen.items():
        path = folder / f"{name}.json"
        if args.list:
            print(f"{name}{' (finished)' if path.exists() else ''}")
            continue
        if not path.exists():
            print(f"{name} ...", file=sys.stderr, flush=True)
            load = os.getloadavg()[0]
            record = {"case": name, **measure(), "load": load, "machine": machine(args.device)}
            folder.mkdir(parents=True, exist_ok=True)
            write_file(path, (json.dumps(record, indent=1) + "\n").encode())
        print(f"\n{name}\n\n{show(json.loads(path.read_text(encoding='utf-8')))}", flush=True)


def read_results(folder: Path, benchmark: str) -> list[dict[str, Any]]:
    """The records of a benchmark's finished cases."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / benchmark).glob("*.json"))]


def show(record: Mapping[str, Any]) -> str:
    """A record's rows as a Markdown table, and what was left out."""
    rows = record["rows"]
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = [[label, *(number(row.get(column)) for column in columns)] for label, row in rows.items()]
    notes = [f"{label}: {reason}" for label, reason in record.get("left_out", {}).items()]
    return "\n\n".join([table(["", *columns], body), *notes])


def number(value: float | None) -> str:
    """A number with four significant digits or more; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between(text: str, name: str) -> str | None:
    """What stands between the marker comments ``name`` in a Markdown text; None where there are none."""
    start, end = markers(name)
    if start not in text or end not in text:
        return None
    return text.partition(start)[2].partition(end)[0].strip("\n")


def markers(name: str) -> tuple[str, str]:
    """The comments around a part of a Markdown file."""
    return f"<!-- {name} -->", f"<!-- end of {name} -->"
