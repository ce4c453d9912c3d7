"""What a run's loop costs beside a bare loop of torch and peft, step by step in turns, and its memory.

    python benchmarks/loop.py [--rounds 200]

Both train the same LoRA on the same rows of one length: a run of ``monteclora train`` with everything it does between
checkpoints (data order, counting, checks for numbers that are not finite, logging, signals), and a DataLoader, the
model's own loss, clipping, AdamW and a schedule. Before each of the run's steps two such loops take one each in the
same process, in changing order; a step is all from one batch to the next. What the second bare loop takes beside the
first is what the procedure itself makes of equal loops. Memory is that of processes that train one of the two.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memory import HighWaterMark
from timing import compare
from torch.utils.data import DataLoader, RandomSampler
from transformers import get_scheduler

from monteclora.runs.prepare import PreparedData, prepare_data, prepare_model
from monteclora.runs.recipe import Recipe, load_recipe
from monteclora.system.devices import training_device
from monteclora.training.loop import Loop
from monteclora.training.run import train

_WARMUP = 10


@dataclass(frozen=True)
class Size:
    """A model, the kind of its task, and rows and tokens of a step."""

    model: str
    kind: str
    rows: int
    length: int


SETTINGS = {
    "minilm 32 x 32": Size("minilm", "classification", 32, 32),
    "smollm2 1 x 64": Size("smollm2", "causal_lm", 1, 64),
}


def recipe_of(size: Size, steps: int, folder: Path) -> Recipe:
    """A run of so many steps on rows of one length, without validation."""
    rows, text = size.rows, " ".join(["the same words again"] * size.length)
    if size.kind == "classification":
        lines = [{"text": f"{number} {text}", "label": "ab"[number % 2]} for number in range(32 * rows)]
    else:
        lines = [{"prompt": f"{number}", "completion": text} for number in range(32 * rows)]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return load_recipe(
        {
            "name": "loop",
            "output": str(folder / f"run-{os.getpid()}"),
            "model": {"name": size.model},
            "data": {"task": str(file), "max_length": size.length, "validation_fraction": 0},
            "method": {"name": "lora", "target_modules": "all-linear"},
            "training": {
                "max_steps": steps,
                "epochs": 1e6,
                "batch_size": rows,
                "save_every": 10**9,
                "logging_every": 10,
            },
        }
    )


def bare_loop(recipe: Recipe, data: PreparedData, steps: int) -> Iterator[None]:
    """A training loop as people write it; every step of the iterator is one of the loop."""
    device = training_device()
    model = prepare_model(recipe, data.task.kind, data.task.label_names, data.tokenizer).to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.training.learning_rate, weight_decay=0.0, fused=True)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    rows, size = data.train, recipe.training.batch_size
    while True:
        loader: Any = DataLoader(rows, size, sampler=RandomSampler(rows), collate_fn=data.collate, drop_last=True)
        for batch in loader:
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            yield


def alternating(setting: Size, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of each step of the run and of the two bare loops, which take one before every step of the run."""
    steps = rounds + _WARMUP + 1
    recipe = recipe_of(setting, steps, folder)
    data = prepare_data(recipe)
    loops = {name: bare_loop(recipe, data, steps) for name in ("bare", "again")}
    times: dict[str, list[float]] = {"bare": [], "again": [], "run": []}
    left: list[float] = []
    step: Callable[..., None] = Loop.step

    def with_bare_step(loop: Loop, batches: Any) -> None:
        entered = time.perf_counter()
        if left:
            times["run"].append(entered - left[-1])
        gc.collect()
        for name in sorted(loops, reverse=len(left) % 2 == 0):
            began = time.perf_counter()
            next(loops[name])
            times[name].append(time.perf_counter() - began)
        left.append(time.perf_counter())
        step(loop, batches)

    gc.disable()
    try:
        Loop.step = with_bare_step  # type: ignore[method-assign]
        train(recipe, progress=False)
    finally:
        Loop.step = step  # type: ignore[method-assign]
        gc.enable()
    return {name: values[_WARMUP : _WARMUP + rounds] for name, values in times.items()}


def peak(which: str, setting: Size, folder: Path, steps: int = 20) -> float:
    """Peak memory in megabytes of a process that loads model and rows and takes some steps."""
    mark = HighWaterMark(training_device())
    recipe = recipe_of(setting, steps, folder)
    if which == "run":
        train(recipe, progress=False)
    else:
        bare = bare_loop(recipe, prepare_data(recipe), steps)
        for _ in range(steps):
            next(bare)
    return mark.read() / 1e6


def in_own_process(which: str, name: str) -> float:
    """:func:`peak` in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", which, "--only", name], check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--child", choices=("run", "bare"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.child:
            print(peak(arguments.child, SETTINGS[arguments.only], Path(folder)))
            return
        for name, setting in SETTINGS.items():
            if arguments.only in (None, name):
                times = alternating(setting, arguments.rounds, Path(folder) / name)
                rows = compare(times, {"run": "bare", "again": "bare"})
                row, control = rows["run"], rows["again"]
                memory = {which: min(in_own_process(which, name) for _ in range(2)) for which in ("bare", "run")}
                print(
                    f"{name}: a step of the run {row['median_ms']:.1f} ms, {row['ratio']:.3f} x the bare loop's "
                    f"({row['ratio_low']:.3f} to {row['ratio_high']:.3f}, {row['rounds']:.0f} rounds; "
                    f"a second bare loop {control['ratio']:.3f}, {control['ratio_low']:.3f} to "
                    f"{control['ratio_high']:.3f}); "
                    f"memory {memory['run']:.0f} MB, {memory['run'] / memory['bare']:.3f} x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
