"""Runs on several processes of this machine (gloo)."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

import tests
from monteclora.runs.run_folder import RunFolder
from tests.training.conftest import Recipe

__all__ = ["environments", "launch", "losses"]

WORKER = """
import errno, json, os, signal, sys, torch
torch.set_num_threads(1)
from monteclora.errors import CheckpointError
from monteclora.posterior import AdapterPosterior
from monteclora.training import checkpoint, run
from monteclora.training.loop import Loop
original_step, kill_at, fail_at = Loop.step, int(sys.argv[3]), int(sys.argv[4])
spoil_at, full_at = int(sys.argv[5]), sys.argv[6]
def full(original):
    def make(target):
        if target.name == full_at and os.environ["RANK"] == "0":
            raise CheckpointError(f"cannot write {target}: {os.strerror(errno.ENOSPC)}", "Make room.")
        return original(target)
    return make
for module in (checkpoint, run):
    module.new_folder = full(module.new_folder)
def spoil(loop):
    with torch.no_grad():
        next(p for p in loop.model.parameters() if p.requires_grad).fill_(float("nan"))
def step(loop, batches):
    if kill_at >= 0 and loop.saver.first_step + loop.state.step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if loop.state.step == fail_at and not loop.state.back_offs:
        spoil(loop)
    original_step(loop, batches)
    if loop.state.step == spoil_at and not loop.state.back_offs:
        spoil(loop)
Loop.step = step
kept = []
original = run.prepare_model
run.prepare_model = lambda *arguments: kept.append(original(*arguments)) or kept[-1]
run.train(json.load(open(sys.argv[1])), progress=False)
weights = [p for p in kept[0].parameters() if p.ndim > 1]
local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in weights)
numbers = {"share": torch.tensor(local / sum(p.numel() for p in weights))}
for posterior in kept[-1].modules():
    if isinstance(posterior, AdapterPosterior) and posterior.current is not None:
        numbers |= {"rho": posterior.rho, "eta": posterior.eta, "noise": posterior.current.row_scale}
torch.save(numbers, sys.argv[2])
"""


def launch(
    recipe: Recipe,
    folder: Path,
    processes: int,
    *,
    sharded: bool = False,
    kill_at: int | None = None,
    fail_at: int | None = None,
    spoil_at: int | None = None,
    full_at: str | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Train a recipe on so many processes; gives what each had in the end.

    That is ``share``, of the model's weights; and rho, eta and the last draw's ``noise``, where there is one.

    Args:
        recipe: of the run.
        folder: is made, for what the processes leave.
        processes: how many.
        sharded: as ``accelerate launch --use_fsdp --fsdp_version 2`` has it.
        kill_at: all of them are killed after so many steps.
        fail_at: after so many steps a weight is not finite, unless the run has gone back.
        spoil_at: the same after that step, so that no loss has told of it when the step is saved.
        full_at: the name of a folder for which the main process finds no room: all must end with that error.
    """
    folder.mkdir()
    file = folder / "recipe.json"
    file.write_text(json.dumps(recipe))
    started = []
    for rank, environment in enumerate(environments(processes, sharded=sharded)):
        command = [sys.executable, "-c", WORKER, str(file), str(folder / f"{rank}.pt")]
        command += ["-1" if step is None else str(step) for step in (kill_at, fail_at, spoil_at)]
        command.append(full_at or "")
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in started]
    for errors, code in ended:
        if full_at is not None:
            assert code == 1
            assert re.search(rf"\bCheckpointError: cannot write \S*/{full_at}: No space left", errors), errors[-3000:]
            continue
        assert code == (0 if kill_at is None else -signal.SIGKILL), errors[-3000:]
    return [torch.load(file) for file in sorted(folder.glob("*.pt"))]


def environments(processes: int, *, sharded: bool = False) -> list[dict[str, str]]:
    """Of each of so many processes that train together, as ``accelerate launch`` sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(tests.__file__).parent.parent
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    if processes == 1:
        return [shared]
    shared |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_USE_CPU": "true"}
    if sharded:
        shared |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def losses(recipe: Recipe) -> list[float]:
    events = RunFolder(Path(recipe["output"])).metrics.read()
    return [event["loss"] for event in events if event["event"] == "train"]
