"""Several processes that each hold the whole model (``torchrun``, ``accelerate launch``)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from monteclora.training.run_folder import RunFolder
from tests.training.conftest import Recipe, adapter_content, quietly, without_times

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would share a GPU"),
]

PROGRAM = """
import json, sys, torch
torch.set_num_threads(1)
from monteclora.training.run import train
train(json.loads(sys.argv[1]), progress=False)
"""


def launch(recipe: Recipe, folder: Path) -> subprocess.Popen[bytes]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    options = ["--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(program), json.dumps(recipe)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()


def test_two_processes_train_stop_and_resume(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    options = {"micro_batch_size": 2, "save_every": 2, "logging_every": 1, "method_options": {"lora_dropout": 0.0}}
    finish(launch(recipe(name="whole", **options), tmp_path))
    parts = recipe(name="parts", **options)
    process = launch(parts, tmp_path)
    while not (tmp_path / "parts/checkpoints/checkpoint-2").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert not (tmp_path / "parts/adapter").exists()
    finish(launch(parts, tmp_path))
    assert adapter_content(tmp_path / "whole") == adapter_content(tmp_path / "parts")
    logs = [without_times(RunFolder(tmp_path / name).metrics.read()) for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_two_processes_share_a_batch(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Without noise and dropout they do what one process does: the batch is the same, and so is its mean."""
    still = {"lora_dropout": 0.0, "sample_scale": 0.0}
    options = {"kind": "causal_lm", "max_steps": 4, "method_options": still, "learning_rate": 1e-3}
    finish(launch(recipe(name="two", **options), tmp_path))
    quietly(recipe(name="one", **options))
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-5)
