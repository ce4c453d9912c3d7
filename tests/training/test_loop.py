"""The loop itself: what a step runs through, and that it is the same step on one process and on several."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType

import monteclora
import tests
from monteclora.errors import ConfigError
from monteclora.runs.run_folder import RunFolder
from monteclora.training.batches import Batch, Batches
from monteclora.training.loop import Loop
from monteclora.training.phases import check_distribution
from tests.training.conftest import Recipe, quietly

MakeRecipe = Callable[..., Recipe]
PACKAGE = Path(monteclora.__file__).parent


@pytest.mark.parametrize("method", ["monteclora", "lora", "full"])
def test_a_step_runs_through_at_most_five_of_our_files(
    method: str, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside adapters/ and posterior/; validating, logging and saving are no part of a step."""
    entered: set[str] = set()
    step, grouped = Loop.step, Batches.steps

    def note(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            entered.add(path.relative_to(PACKAGE).as_posix())

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            sys.setprofile(note)
            try:
                return function(*args)
            finally:
                sys.setprofile(None)

        return call

    monkeypatch.setattr(Loop, "step", traced(step))
    monkeypatch.setattr(Batches, "steps", traced(grouped))
    made = recipe(method=method, max_steps=3, eval_every=20)
    if method == "full":
        made["method"] = {"name": method}
    quietly(made)
    counted = {name for name in entered if not name.startswith(("adapters/", "posterior/"))}
    assert "training/loop.py" in counted
    assert len(counted) <= 5, counted


def test_the_callers_generators_are_left_alone(recipe: MakeRecipe) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quietly(recipe(max_steps=2))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_row_is_seen_once_in_the_order_of_one_process(processes: int) -> None:
    rows, micro, accumulated = 38, 2, 2

    def plans(count: int, micro: int, accumulated: int) -> list[Any]:
        options: dict[str, Any] = {"collate": None, "columns": [], "seed": 3, "processes": count}
        return [
            Batches(range(rows), process=process, micro=micro, accumulated=accumulated, **options).plan(1)  # type: ignore[arg-type]
            for process in range(count)
        ]

    (whole,) = plans(1, micro * accumulated * processes, 1)
    shared = plans(processes, micro, accumulated)
    assert {len(plan) for plan in shared} == {len(whole)}
    for number, (step,) in enumerate(whole):
        passes = [plan[number] for plan in shared]
        assert len({len(each) for each in passes}) == 1  # or some would wait for the others for ever
        interleaved = [rows for turn in zip(*passes, strict=True) for each in turn for rows in each]
        assert interleaved == step


WORKER = """
import gc, json, sys, torch
torch.set_num_threads(1)
from monteclora.posterior import AdapterPosterior
from monteclora.training import run
kept = []
original = run.prepare_model
run.prepare_model = lambda *arguments: kept.append(original(*arguments)) or kept[-1]
run.train(json.load(open(sys.argv[1])), progress=False)
posterior = next(m for m in kept[0].modules() if isinstance(m, AdapterPosterior))
torch.save({"rho": posterior.rho, "eta": posterior.eta, "noise": posterior.current.row_scale}, sys.argv[2])
"""


def launch(recipe: Recipe, folder: Path, processes: int) -> list[dict[str, torch.Tensor]]:
    """Train a recipe on so many processes; gives rho, eta and the last draw of each."""
    folder.mkdir()
    file = folder / "recipe.json"
    file.write_text(json.dumps(recipe))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(tests.__file__).parent.parent
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    if processes > 1:
        shared |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"ACCELERATE_USE_CPU": "true"}
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        command = [sys.executable, "-c", WORKER, str(file), str(folder / f"{rank}.pt")]
        started.append(subprocess.Popen(command, env={**shared, **place}, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def losses(recipe: Recipe) -> list[float]:
    events = RunFolder(Path(recipe["output"])).metrics.read()
    return [event["loss"] for event in events if event["event"] == "train"]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Without noise and dropout; 38 rows, so that the last batch of an epoch is ragged and unevenly shared."""

    def made(name: str, scale: float, **training: Any) -> Recipe:
        return recipe(
            kind="causal_lm",
            name=name,
            method_options={"sample_scale": scale, "lora_dropout": 0.0},
            logging_every=1,
            **training,
        )

    one, two = made("one", 0.0), made("two", 0.0, micro_batch_size=2)
    launch(one, tmp_path / "one-process", 1)
    ranks = launch(two, tmp_path / "two-processes", 2)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ("rho", "eta"))
    noisy = launch(made("noisy", 0.1, micro_batch_size=2), tmp_path / "noisy-processes", 2)
    assert all(torch.equal(noisy[0][name], noisy[1][name]) for name in ("rho", "eta"))
    assert not torch.equal(noisy[0]["noise"], noisy[1]["noise"])


def test_a_process_without_rows_counts_none_of_its_labels() -> None:
    from monteclora.training.batches import _batch

    batch = _batch([], {"input_ids": torch.ones(1, 3), "labels": torch.tensor([2])})
    assert isinstance(batch, Batch)
    assert (batch.inputs["labels"] == -100).all()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_models_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"this one was launched with {kind}"):
        check_distribution(DistributedType(kind))
    check_distribution(DistributedType.MULTI_GPU)
