"""Peak memory of training beside peft's LoRA, each kind in a process of its own.

    python benchmarks/memory.py

Three steps with AdamW. On the CPU the high-water mark of resident memory, reset once the base model is loaded; on a
GPU the most that torch allocated. ``above_base_mb`` is what wrapping and training take on top of the loaded model.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import KINDS, Setting, batch_of, build, load_base, refusal, training_step
from results import arguments, available_memory, run_cases
from transformers import PreTrainedModel

_SIZES = (Setting("smollm2", "1x16"), Setting("smollm2", "4x128"), Setting("minilm", "32x128"))
SETTINGS = [replace(s, r=r, num_components=n) for s in _SIZES for r, n in ((8, 4), (8, 256), (64, 4))]


class HighWaterMark:
    """The most memory taken since this object was made, and what was taken then, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        # what loading freed would otherwise hide what training takes
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = _status("VmRSS")

    def read(self) -> int:
        """The mark."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak(kind: str, base: PreTrainedModel, setting: Setting, steps: int = 3) -> dict[str, float]:
    """Peak memory of wrapping ``base`` and taking some training steps, in megabytes."""
    mark = HighWaterMark(base.device)
    step = training_step(kind, build(kind, base, setting), batch_of(base, setting), setting)
    for _ in range(steps):
        step()
    most = mark.read()
    return {"peak_mb": most / 1e6, "above_base_mb": (most - mark.before) / 1e6}


def in_own_process(kind: str, setting: Setting, args: argparse.Namespace) -> dict[str, float]:
    """:func:`peak` of a kind in a new process."""
    child = json.dumps({"kind": kind, "setting": asdict(setting)})
    command = [sys.executable, __file__, "--device", args.device, "--child", child]
    command += ["--threads", str(args.threads)] if args.threads else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    setting: Setting,
    kinds: Sequence[str],
    repeats: int,
    base: PreTrainedModel,
    measured: Callable[[str], dict[str, float]],
) -> dict[str, Any]:
    """Medians over repeats for every kind that fits into memory, and their ratios to LoRA's.

    Args:
        setting: of all.
        kinds: to compare, ``lora`` among them.
        repeats: how often each is measured.
        base: tells what the kinds would take.
        measured: the peak of a kind.
    """
    reasons = {kind: refusal(kind, base, setting, available_memory(str(base.device))) for kind in kinds}
    rows: dict[str, dict[str, float]] = {}
    for kind in (kind for kind, reason in reasons.items() if reason is None):
        found = [measured(kind) for _ in range(repeats)]
        rows[kind] = {name: statistics.median(one[name] for one in found) for name in found[0]}
    for row in rows.values():
        row["ratio"] = row["peak_mb"] / rows["lora"]["peak_mb"]
        row["above_base_ratio"] = row["above_base_mb"] / max(rows["lora"]["above_base_mb"], 1e-9)
    return {"rows": rows, "left_out": {kind: reason for kind, reason in reasons.items() if reason}}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        if args.threads:
            torch.set_num_threads(args.threads)
        child = json.loads(args.child)
        setting = Setting(**child["setting"])
        print(json.dumps(peak(child["kind"], load_base(setting.model, args.device, setting.dtype), setting)))
        return

    def case(setting: Setting) -> dict[str, Any]:
        base = load_base(setting.model, args.device, setting.dtype)
        one = partial(in_own_process, setting=setting, args=args)
        return measure(setting, args.kinds.split(","), args.repeats, base, one)

    run_cases("memory", {setting.name: partial(case, setting) for setting in SETTINGS}, args)


if __name__ == "__main__":
    main()
