"""Adapters and runs as this version of the code writes them, kept under ``tests/fixtures`` for later versions to load.

``python -m tests.old_files NAME`` writes ``tests/fixtures/NAME`` anew: do it under a new name when a format changes,
and leave the older folders as they are. The base models are not kept: their weights follow from a formula.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import monteclora
from monteclora import evaluate, posterior_sampling, train, variational_loss
from tests.finished_runs import texts, write_rows
from tests.models import batch_for, bert, llama, wrapped
from tests.training.conftest import StopAfter, save_tokenizer, train_until

FIXTURES = Path(__file__).parent / "fixtures"
BASES: dict[str, Callable[[], Any]] = {"llama": llama, "bert": bert}
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
STEPS, STOPPED = 6, 3


def base_model(name: str) -> Any:
    """A tiny model whose weights are the same in every version of torch and transformers."""
    return by_formula(BASES[name]())


def by_formula(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            phase = zlib.crc32(key.encode()) % 1000
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 12.9898 + phase)
            centre = 1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0
            parameter.copy_((centre + 0.2 * wave).reshape(parameter.shape))
    return model


def numbers_of(model: Any, name: str) -> dict[str, Any]:
    """What an adapter computes: at its mean, under two draws, and its regulariser."""
    batch = batch_for(BASES[name])
    batch.pop("labels")
    model.eval()
    with torch.no_grad():
        found = {"mean": model(**batch).logits, "regulariser": variational_loss(model)}
        with posterior_sampling(model, seed=7):
            found |= {f"draw {i}": model(**batch).logits for i in range(2)}
    return {key: value.flatten()[:12].tolist() for key, value in found.items()}


def run_recipe() -> dict[str, Any]:
    """Of a run in the current folder, whose ``model`` and ``train.jsonl`` :func:`run_assets` writes."""
    return {
        "name": "old",
        "output": "run",
        "model": {"name": "./model"},
        "data": {"train_file": "train.jsonl", "max_length": 16, "validation_fraction": 0.2},
        "method": {"name": "monteclora", "r": 2, "target_modules": ["query", "value"]},
        "training": {"max_steps": STEPS, "batch_size": 8, "learning_rate": 2e-2, "save_every": STOPPED},
        "evaluation": {"num_samples": 3},
    }


@contextmanager
def run_assets(folder: Path) -> Iterator[None]:
    """The current folder is ``folder``, and holds what the recipe names."""
    base_model("bert").bert.save_pretrained(folder / "model")
    save_tokenizer(folder / "model", classifies=True)
    write_rows(folder / "train.jsonl", texts(36, seed=0))
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def metrics_of(run: str, **options: Any) -> dict[str, Any]:
    result = evaluate(run, "validation", progress=False, **options)
    return {"point": dict(result.point), "posterior": dict(result.posterior or {})}


def write_adapter(target: Path, name: str) -> None:
    model = wrapped(BASES[name], r=2, target_modules=TARGETS[name], num_components=3)
    model.save_pretrained(str(target))
    (target / "README.md").unlink()
    fresh = monteclora.from_pretrained(base_model(name), str(target))
    (target / "expected.json").write_text(json.dumps(numbers_of(fresh, name), indent=1) + "\n")


def write_run(target: Path, stopped: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch, run_assets(Path(scratch)), pytest.MonkeyPatch.context() as patch:
        if stopped:
            train_until(patch, StopAfter(STOPPED), run_recipe())
        else:
            train(run_recipe(), progress=False)
        expected = metrics_of("run", allow_unfinished=stopped)
        for name in ("predictions.parquet", "evaluation.json", ".lock"):
            Path("run", name).unlink()
        for card in Path("run").rglob("README.md"):
            card.unlink()
        shutil.copytree("run", target)
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    place = FIXTURES / sys.argv[1]
    for base in BASES:
        write_adapter(place / f"adapter-{base}", base)
    write_run(place / "run-finished", stopped=False)
    write_run(place / "run-unfinished", stopped=True)
