"""A run that was interrupted, in whatever way, is the run that was not."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monteclora.runs.run_folder import RunFolder
from monteclora.training.interruption import Interruption, TrainingInterrupted
from monteclora.training.run import train
from tests.training.conftest import Recipe, StopAfter, quietly, trace, train_until

MakeRecipe = Callable[..., Recipe]


def assert_same(one: Path, other: Path) -> None:
    first, second = trace(one), trace(other)
    assert first["metrics"] == second["metrics"]
    for part, value in first.items():
        assert value == second[part], f"{part} differs"


CASES = {
    "classification, lora": {"kind": "classification", "method": "lora"},
    "classification, accumulated": {"kind": "classification", "method": "monteclora", "micro_batch_size": 4},
    "causal lm, lora": {"kind": "causal_lm", "method": "lora"},
    "causal lm, full covariance": {
        "kind": "causal_lm",
        "method": "monteclora",
        "method_options": {"covariance": "full", "noise": "per_example", "regulariser": "sampled"},
    },
    "rows grouped by length": {"kind": "classification", "method": "monteclora", "group_by_length": True},
    "post hoc": {
        "kind": "classification",
        "method": "monteclora",
        "mode": "post_hoc",
        "max_steps": 6,
        "post_hoc": {"max_steps": 5},
        "best_metric": "nll",
    },
    "best, often": {
        "kind": "classification",
        "method": "monteclora",
        "best_metric": "nll",
        "eval_every": 2,
        "early_stopping_patience": 2,
        "save_every": 3,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_at_several_steps_and_resumed(
    case: str, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole: dict[str, Any] = recipe(name="whole", **CASES[case])
    parts = recipe(name="parts", **CASES[case])
    steps = quietly(whole).steps
    done = 0
    for more in (2, 3, 2):  # in the first epoch, at its end, in the second one or another phase
        if done + more < steps:
            train_until(monkeypatch, StopAfter(more), parts)
            done += more
    assert done >= 2
    quietly(parts)
    assert_same(tmp_path / "whole", tmp_path / "parts")


class StopInEvaluation(Interruption):
    """A request that comes in during an evaluation, between two batches."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.asked = asked

    @property
    def requested(self) -> bool:
        self.asked -= 1
        return self.asked < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        pass

    def agreed(self, device: Any) -> bool:
        return False


@pytest.mark.parametrize("batches", [1, 7])
def test_stopped_inside_an_evaluation(
    batches: int, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # 6 validation rows, one a batch: the second request is in the last evaluation
    options = {"best_metric": "nll", "eval_batch_size": 1}
    quietly(recipe(name="whole", **options))
    parts = recipe(name="parts", **options)
    train_until(monkeypatch, StopInEvaluation(batches), parts)
    events = [event["event"] for event in RunFolder(tmp_path / "parts").metrics.read()]
    assert events.count("eval") == batches // 6
    quietly(parts)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_is_not_trained_again(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quietly(recipe())
    monkeypatch.setattr("monteclora.training.run._train", lambda *args: pytest.fail("it was trained"))
    assert quietly(recipe()) == first


def start(recipe: Recipe) -> multiprocessing.process.BaseProcess:
    """Train in a process of its own; forked, because importing everything again takes longer than the test."""

    def work() -> None:
        try:
            train(recipe, progress=False)
        except TrainingInterrupted as error:
            os._exit(130 if "the same command resumes it" in str(error) else 1)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def wait_until(reached: Callable[[], object], process: multiprocessing.process.BaseProcess) -> None:
    while not reached():
        assert process.exitcode is None
        time.sleep(0.01)


def test_killed_outright(recipe: MakeRecipe, tmp_path: Path) -> None:
    quietly(recipe(name="whole", save_every=2, keep_checkpoints=2, epochs=8))
    parts = recipe(name="parts", save_every=2, keep_checkpoints=2, epochs=8)
    process = start(parts)
    wait_until((tmp_path / "parts/checkpoints/checkpoint-6").exists, process)
    process.kill()
    process.join()
    assert not (tmp_path / "parts/adapter").exists()
    quietly(parts)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert not list((tmp_path / "parts/checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_by_a_signal(number: signal.Signals, recipe: MakeRecipe, tmp_path: Path) -> None:
    process = start(recipe(epochs=200, save_every=1000, eval_every=1000, logging_every=1))
    run = RunFolder(tmp_path / "run")
    wait_until(run.metrics.read, process)
    os.kill(process.pid or 0, number)
    process.join()
    assert process.exitcode == 130
    saved = [path.name for path in run.checkpoints.glob("checkpoint-*")]
    assert len(saved) == 1
    assert saved != ["checkpoint-1000"]


def test_resuming_by_the_same_call_reports_the_whole_run(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    train_until(monkeypatch, StopAfter(4), recipe())
    result = train(recipe(), progress=False)
    assert result.steps == 10
    assert result.tokens > 300
    assert result.metrics["nll"] > 0
